"""Flags of the data: `--data.*`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """The data to train and evaluate on, such as --data.train_file my.csv or --data.name glue/sst2."""

    name: str | None = None
    """Dataset: python-docs (built in), wikitext-2-raw-v1, glue/sst2 and others, or any dataset id on the hub."""
    subset: str | None = None
    """Configuration of the hub dataset, if it has several."""
    train_file: str | None = None
    """Local .txt, .csv, .tsv, .json, .jsonl or .parquet file, instead of name, such as --data.train_file my.csv; for token-classification
    also .conll, .bio, .iob or .conllu, and then .txt is a CoNLL file."""
    validation_file: str | None = None
    """Local file; null: a tenth of the training rows is held out for validation."""
    test_file: str | None = None
    """Local file; null: test figures are measured on the validation rows."""
    column_names: list[str] | None = None
    """Column names of .csv and .tsv files without a header line, such as '[text, label]', and of CoNLL files."""
    delimiter: str | None = None
    """Character between the fields of .csv and .tsv files: ',', ';', '|', tab or another one; null: found from the first rows."""
    quotes: bool | None = None
    """Quotes in .csv and .tsv files: true: a field in double quotes may hold the delimiter and line breaks; false: quotes are part
    of the text; null: true, and in files with tabs only if a program has written the quotes."""
    encoding: str | None = None
    """Encoding of text files, such as latin-1, cp1252 or utf-16; null: utf-8, or what the file's byte order mark says."""
    field: str | None = None
    """Key of the rows in a .json file that is one object, such as data for {"data": [...]}."""
    glob: bool = False
    """The files' names are patterns of several files (*, ?, [...], ** for folders), read in the order of their names, such as
    'shards/*.csv'. false: a name means one file, and all its characters mean themselves."""
    drop_empty: bool = False
    """Leave out rows without a text and say how many; false: masked-lm keeps blank lines, and the other tasks refuse such rows."""
    text_column: str | None = None
    """Column with the text, the list of words (token-classification) or the question; null: 'text', or another usual name for it."""
    text_pair_column: str | None = None
    """Column with the second text of a pair, the context of a question, or the text that belongs to the first one (sentence-embeddings)."""
    negative_column: str | None = None
    """Column with a text that does not belong to the first one (sentence-embeddings); null: the other rows' texts alone serve as such."""
    label_column: str | None = None
    """Column with the label, the list of labels (multi-label) or tags (token-classification), the answers to a question, or the
    similarity of a pair (sentence-embeddings); null: 'label', or another usual name for it."""
    label_columns: list[str] | None = None
    """Columns with 0 and 1 (or true and false), one for each class, such as '[toxic, obscene]'; null: one label_column (multi-label)."""
    label_delimiter: str | None = None
    """Text between the classes of a label such as "a,b" (multi-label); null: found among , ; and |."""
    label_names: list[str] | None = None
    """Names of all classes in the order of their ids; null: the base's own if the data has these, else those in train, sorted."""
    num_labels: int | None = None
    """Number of classes, if the labels are class ids; null: counted in train."""
    regression: bool = False
    """Predict the labels as numbers, even if all are whole numbers such as ratings from 1 to 5."""
    drop_unlabelled: bool = False
    """Leave out rows without a label (empty, null, - or -1), and say how many."""
    max_length: int = 128
    """Tokens per row: the block length in masked-lm, the truncation limit in classification, the length of a window in
    token-classification and question-answering."""
    doc_stride: int | None = None
    """Tokens that two windows of a long text share, at most half of a window; null: 32 in token-classification, 128 in
    question-answering."""
    max_answer_length: int = 30
    """Most tokens of a predicted answer (question-answering)."""
    mask_ratio: float = 0.15
    """Share of the real tokens of each row that are masked, exact for every row (masked-lm)."""
    whole_word_masking: bool = False
    """Mask all tokens of a word together (masked-lm); a row may then have a few masked tokens less than mask_ratio says."""
    join_texts: bool = True
    """true: texts are joined and cut into full rows (masked-lm). false: each text is a row; longer ones are cut to max_length."""
    bucket_lengths: list[int] = dataclasses.field(default_factory=lambda: [16, 32, 64, 128, 256, 512])
    """Lengths in tokens to which rows of different lengths are padded; one program is compiled for each length in use."""
    packing: bool = False
    """Put several texts in each row of up to max_length tokens (classification). Texts per batch stay the same; one program."""
    token_cache: str | None = "auto"
    """Directory of tokenised rows of files and hub datasets, for later runs; auto: ~/.cache/jaxpeft/tokens; null: no cache."""
