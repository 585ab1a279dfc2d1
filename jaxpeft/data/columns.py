"""Find the columns of a table that hold the text, its pair and the label, and read their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxpeft.data.glue import GLUE
from jaxpeft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

# Guesses for tables whose columns the user did not name: the hub's usual name, and those of GLUE.
_KNOWN_TEXT_COLUMNS = {("text",), *(task.text_columns for task in GLUE.values())}


@dataclass(frozen=True)
class Columns:
    """Names of columns. Those of the pair, the label and the negative are None if the table has no such column."""

    text: str
    pair: str | None
    label: str | None
    negative: str | None = None


def choose_columns(
    available: Sequence[str],
    where: str,
    *,
    text: str | None,
    pair: str | None,
    label: str | None,
    negative: str | None = None,
) -> Columns:
    """The named columns or, for those that are None, a guess.

    The guess for the text is `text` or the columns of a GLUE task, and for the label `label`. Raises InputError with
    the list of columns if a named column is missing, or if the guess is impossible or ambiguous.
    """
    flags = {"text_column": text, "text_pair_column": pair, "label_column": label, "negative_column": negative}
    for flag, name in flags.items():
        if name is not None and name not in available:
            hint = f"{did_you_mean(name, available)}; columns: {', '.join(available)}"
            raise InputError(f"data.{flag}='{name}': {where} has no such column{hint}")
    if text is None and pair is not None:
        raise InputError(
            f"data.text_pair_column='{pair}' also needs data.text_column; columns of {where}: {', '.join(available)}"
        )
    if text is None:
        text, pair = _guess_text(available, where)
    label = label if label is not None else ("label" if "label" in available else None)
    return Columns(text, pair, label, negative)


def _guess_text(available: Sequence[str], where: str) -> tuple[str, str | None]:
    found = [columns for columns in _KNOWN_TEXT_COLUMNS if set(columns) <= set(available)]
    # "question, sentence" (QNLI) contains "sentence", so the more specific choice wins.
    found = [columns for columns in found if not any(set(columns) < set(other) for other in found)]
    if len(found) != 1:
        problem = "several columns could be the text" if found else "no column is known to be the text"
        way_out = "set data.text_column (and data.text_pair_column), or data.column_names if the file has no header"
        raise InputError(f"{where}: {problem} ({', '.join(available)}); {way_out}")
    text, *pair = found[0]
    return text, pair[0] if pair else None


def column_values(table: Dataset, column: str) -> list[Any]:
    """The values of one column, without reading the others."""
    return table.select_columns([column])[:][column]


def class_names(table: Dataset, column: str) -> tuple[str, ...] | None:
    """The class names that a hub dataset declares for its label column, or for the entries of its lists; None if it declares none."""
    feature = table.features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return None if names is None else tuple(names)
