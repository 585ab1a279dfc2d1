"""From a dataset's name or files to numpy batches of static shapes. Nothing here imports jax, models or training."""

from jaxpeft.data.classification import ClassificationData, Encoded, classification_data, encode_texts
from jaxpeft.data.glue import GLUE, GlueTask
from jaxpeft.data.masked_lm import (
    MaskedLMData,
    make_blocks,
    mask_rows,
    maskable,
    masked_lm_data,
    num_masked,
)
from jaxpeft.data.packing import PackedData
from jaxpeft.data.python_docs import load_python_docs
from jaxpeft.data.sources import load_file, load_splits
from jaxpeft.data.splits import Split, Splits
from jaxpeft.data.texts import TextColumn
from jaxpeft.data.token_cache import TokenCache

__all__ = [
    "GLUE",
    "ClassificationData",
    "Encoded",
    "GlueTask",
    "MaskedLMData",
    "PackedData",
    "Split",
    "Splits",
    "TextColumn",
    "TokenCache",
    "classification_data",
    "encode_texts",
    "load_file",
    "load_python_docs",
    "load_splits",
    "make_blocks",
    "mask_rows",
    "maskable",
    "masked_lm_data",
    "num_masked",
]
