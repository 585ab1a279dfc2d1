"""Flags of the data: `--data.*`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """What it learns from."""

    name: str | None = None
    """python-docs (built in), wikitext-2-raw-v1, glue/sst2 and its like, or any dataset on the hub."""
    subset: str | None = None
    """The hub dataset's configuration, where it has several."""
    train_file: str | None = None
    """Local .txt, .csv, .tsv, .jsonl or .parquet file, instead of name."""
    validation_file: str | None = None
    """Local file; null: a tenth of the training rows is held out."""
    test_file: str | None = None
    """Local file; null: the test figures are the validation's."""
    column_names: list[str] | None = None
    """Names of the columns of a .csv or .tsv without a header line."""
    text_column: str | None = None
    """Column with the text; null: the known one."""
    text_pair_column: str | None = None
    """Column with the second text of a pair, for classification."""
    label_column: str | None = None
    """Column with the label, for classification; null: the known one."""
    max_length: int = 128
    """Tokens in a row: the block's length in masked-lm, the limit of truncation in classification."""
    mask_ratio: float = 0.15
    """Share of the real tokens that is masked (masked-lm), exact for every row."""
    bucket_lengths: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256, 512])
    """Tokens: lengths to which classification rows are padded; one program is compiled for each in use."""
    packing: bool = False
    """Train a classifier on rows of max_length tokens with several texts each, as many texts a batch as without; one program."""
