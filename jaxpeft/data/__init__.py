"""From a dataset's name or files to numpy batches of static shapes. Nothing here imports jax, models or training."""

from jaxpeft.data.classification import ClassificationData, Encoded, classification_data, encode_texts
from jaxpeft.data.files import read_file
from jaxpeft.data.glue import GLUE, GlueTask
from jaxpeft.data.masked_lines import MaskedLines, masked_lines
from jaxpeft.data.masked_lm import MaskedLMData, make_blocks, masked_lm_data
from jaxpeft.data.masks import mask_rows, maskable, num_masked
from jaxpeft.data.multi_label import encode_label_lists, with_label_lists
from jaxpeft.data.packing import PackedData
from jaxpeft.data.pair_scoring import RELEVANT, QueryData, encode_scores, hold_out_queries, is_ranked, query_ids
from jaxpeft.data.python_docs import load_python_docs
from jaxpeft.data.question_answering import LongQuestion, QuestionAnsweringData, question_answering_data
from jaxpeft.data.questions import has_unanswerable, question_splits, questions_to_answer
from jaxpeft.data.sentence_pairs import SentencePairData, questions_of, read_sentence_pairs, sentence_pair_data
from jaxpeft.data.sources import (
    PYTHON_DOCS,
    ReadOptions,
    classes_or_numbers,
    load_file,
    load_splits,
    text_splits,
    texts_to_answer,
)
from jaxpeft.data.splits import Split, Splits
from jaxpeft.data.squad_files import read_question_file
from jaxpeft.data.tables import ReadFile, Tables, read_tables
from jaxpeft.data.texts import TextColumn
from jaxpeft.data.token_cache import TokenCache

__all__ = [
    "GLUE",
    "PYTHON_DOCS",
    "RELEVANT",
    "ClassificationData",
    "Encoded",
    "GlueTask",
    "LongQuestion",
    "MaskedLMData",
    "MaskedLines",
    "PackedData",
    "QueryData",
    "QuestionAnsweringData",
    "ReadFile",
    "ReadOptions",
    "SentencePairData",
    "Split",
    "Splits",
    "Tables",
    "TextColumn",
    "TokenCache",
    "classes_or_numbers",
    "classification_data",
    "encode_label_lists",
    "encode_scores",
    "encode_texts",
    "has_unanswerable",
    "hold_out_queries",
    "is_ranked",
    "load_file",
    "load_python_docs",
    "load_splits",
    "make_blocks",
    "mask_rows",
    "maskable",
    "masked_lines",
    "masked_lm_data",
    "num_masked",
    "query_ids",
    "question_answering_data",
    "question_splits",
    "questions_of",
    "questions_to_answer",
    "read_file",
    "read_question_file",
    "read_sentence_pairs",
    "read_tables",
    "sentence_pair_data",
    "text_splits",
    "texts_to_answer",
    "with_label_lists",
]
