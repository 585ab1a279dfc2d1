"""How a run turns texts into rows: one object for its training, evaluation and prediction."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxpeft.data import Split, TokenCache
from jaxpeft.errors import InputError


@dataclass(frozen=True)
class RowOptions:
    """The options that turn texts into rows: the flags of the same names in `data`, and the place that keeps the rows.

    `doc_stride` None is the task's own default.
    """

    max_length: int = 128
    mask_ratio: float = 0.15
    bucket_lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    token_cache: TokenCache | None = None
    whole_word_masking: bool = False
    join_texts: bool = True
    doc_stride: int | None = None
    max_answer_length: int = 30

    @classmethod
    def of(cls, flags: Any, cache: TokenCache | None = None) -> RowOptions:
        """The options with the values of the attributes of the same names of `flags`."""
        names = [field.name for field in fields(cls) if field.name != "token_cache"]
        options = {name: getattr(flags, name) for name in names}
        return cls(**{**options, "bucket_lengths": tuple(flags.bucket_lengths)}, token_cache=cache)


@dataclass(frozen=True)
class TextPipeline:
    """Everything that decides how a run's texts become rows, and how its outputs become answers.

    Training, evaluation and prediction use the same one, so a text has the same tokens in all of them.

    Attributes:
        tokenizer: a transformers tokenizer. Its special tokens are used, and it cuts long texts at its own side. Rows are padded
            at the end, whichever side the tokenizer pads.
        rows: the options of the rows.
        num_positions: the model's positions for a text, without those of virtual tokens.
        reads_pairs: True if every row has two texts; None if that is not known.
        label_names: the names of the classes in the order of their ids, or None.
    """

    tokenizer: Any
    rows: RowOptions
    num_positions: int
    reads_pairs: bool | None = None
    label_names: tuple[str, ...] | None = None

    def check(self, split: Split) -> None:
        """Raise InputError if the rows have one text and the run was trained on pairs, or the other way round."""
        given = split.pairs is not None
        if self.reads_pairs is not None and given != self.reads_pairs:
            trained = "pairs of texts" if self.reads_pairs else "single texts"
            found = "pairs" if given else f"a single text ({str(split.texts[0])[:40]!r})"
            way = "give two texts for each row" if self.reads_pairs else "give one text for each row"
            raise InputError(f"the run was trained on {trained}, and it is asked about {found}: {way}")
