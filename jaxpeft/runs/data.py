"""Turn the data's flags into a task and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jaxpeft.adapters import Method, SiteMethod
from jaxpeft.config import DataConfig, ModelConfig
from jaxpeft.data import (
    GLUE,
    PYTHON_DOCS,
    PackedData,
    ReadOptions,
    Split,
    Splits,
    TokenCache,
    load_python_docs,
    read_tables,
)
from jaxpeft.errors import InputError
from jaxpeft.models.attention import check_packing
from jaxpeft.models.build import Model
from jaxpeft.models.inputs import max_tokens
from jaxpeft.report.console import log
from jaxpeft.runs.base_model import label_names_of_base
from jaxpeft.runs.user_cache import AUTO, default_folder, writable_folder
from jaxpeft.tasks import TASKS
from jaxpeft.tasks.base import Task
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline

_TOKENS = "tokens"


def load_data(
    data: DataConfig, task_name: str, model: ModelConfig | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Task, Splits]:
    """Read the texts and labels that `data` names.

    Args:
        data: the flags of the data.
        task_name: the task.
        model: the base. Classes that it knows by name get its ids.
        options: the task's own flags (`RunConfig.task_options`).

    Returns:
        the task for these labels (for example regression, if they are numbers), and the splits.

    Raises:
        InputError: as `read_tables` and `Task.read`, or the rows do not fit the task.
    """
    kind: type[Task] = TASKS[task_name]
    base_names = label_names_of_base(model) if model and kind.reads_labels else None
    if data.name == PYTHON_DOCS and data.train_file is None:
        splits = load_python_docs()
    else:
        tables = read_tables(
            data.name,
            subset=data.subset,
            train_file=data.train_file,
            validation_file=data.validation_file,
            test_file=data.test_file,
            glob=data.glob,
            read_file=kind.read_file,
            **file_options(data),
        )
        splits = kind.read(tables, read_options(data, kind, base_names))
    glue = GLUE.get((data.name or "").removeprefix("glue/"))
    task = kind.for_labels(splits.num_labels, glue.metrics if glue else ()).with_names(splits.label_names)
    task = task.configured(options or {}, splits)
    task.check_data(splits)
    return task.for_splits(splits), replace(splits, notes=(*splits.notes, *task.data_notes(splits)))


def file_options(data: DataConfig) -> dict[str, Any]:
    """The arguments of `read_file` that say in which format the files of `data` are."""
    return {name: getattr(data, name) for name in ("column_names", "delimiter", "quotes", "encoding", "field")}


def read_options(data: DataConfig, kind: type[Task], base_names: Sequence[str] | None = None) -> ReadOptions:
    """How the rows of `data` are read for the task `kind`. `base_names` are the names of the base's classes, if it has some."""
    return ReadOptions(
        text_column=data.text_column,
        text_pair_column=data.text_pair_column,
        label_column=data.label_column,
        label_columns=data.label_columns,
        label_delimiter=data.label_delimiter,
        negative_column=data.negative_column,
        label_names=data.label_names,
        num_labels=1 if data.regression else data.num_labels,
        base_names=base_names,
        drop_unlabelled=data.drop_unlabelled,
        # Blank lines are part of running text.
        empty_texts="drop" if data.drop_empty else "refuse" if kind.reads_labels else "keep",
    )


def read_texts(
    data: DataConfig, kind: type[Task], path: str, *, text_column: str | None, text_pair_column: str | None
) -> Split:
    """The texts of the file at `path` for prediction, without labels, and with empty ones, so that every row has an answer.

    Columns that are not given are those of `data`, but for the second text of a task that also answers single texts. So are the options of
    reading, if the file is of the same format.

    Raises:
        InputError: as `read_file` and `Task.read_questions`.
    """
    alike = Path(path).suffix == Path(data.train_file or "").suffix
    options = replace(read_options(data, kind), empty_texts="keep")
    if data.train_file is None:
        options = options.for_dataset(data.name)
    options = replace(
        options,
        text_column=text_column or options.text_column,
        text_pair_column=text_pair_column or (None if kind.answers_single_texts else options.text_pair_column),
    )
    table = kind.read_question_file(path, alike=alike, **(file_options(data) if alike else {}))
    return kind.read_questions(table, path, options)


def row_options(data: DataConfig) -> RowOptions:
    """The flags of `data` that turn texts into rows.

    Raises:
        InputError: `data.token_cache` is a directory that cannot be written to.
    """
    return RowOptions.of(data, token_cache(data.token_cache))


def token_cache(directory: str | None) -> TokenCache | None:
    """The cache of tokenised rows in `directory` ("auto": `jaxpeft/tokens` in the user's cache directory), or None for None."""
    if directory is None:
        return None
    # With its name, because the same word may mean another folder later in this process.
    return _token_cache(directory, default_folder(_TOKENS) if directory == AUTO else None)


def text_pipeline(
    data: DataConfig,
    model: Model,
    tokenizer: Any,
    *,
    method: Method | None = None,
    reads_pairs: bool | None = None,
    label_names: Sequence[str] | None = None,
) -> TextPipeline:
    """The pipeline that turns the texts of a run into rows.

    Args:
        data: the run's flags.
        model: the base, which has a number of positions.
        tokenizer: its tokenizer.
        method: the run's method, whose virtual tokens take up positions.
        reads_pairs: True if each of the run's rows has two texts; None if any may have them.
        label_names: the names of the classes, or None.
    """
    virtual = method.virtual_tokens if isinstance(method, SiteMethod) else 0
    names = None if label_names is None else tuple(label_names)
    return TextPipeline(tokenizer, row_options(data), max_tokens(model.config) - virtual, reads_pairs, names)


@cache  # of several calls for one run, only the first one warns
def _token_cache(directory: str, _: Path | None) -> TokenCache | None:
    folder = writable_folder(directory, name=_TOKENS, flag="data.token_cache", content="tokenised rows")
    return TokenCache(folder, log) if folder else None


def training_data(
    task: Task,
    split: Split,
    model: Model,
    pipeline: TextPipeline,
    *,
    packing: bool,
    batch_size: int,
    seed: int,
    num_devices: int,
) -> Any:
    """The training rows in batches of `batch_size` texts. With `packing`, a row holds several texts.

    Raises:
        InputError: `packing` is set, but the task or the attention of `model` does not support it.
    """
    rows = task.make_data(split, pipeline, batch_size=batch_size, seed=seed)
    if not packing:
        return rows
    if not task.can_pack:
        raise InputError(f"data.packing cannot be used with {task.name}; set it to false")
    check_packing(model)
    return PackedData(rows, pipeline.rows.max_length, num_devices)


def without_packing(data: Any) -> Any:
    """`data` itself, or the unpacked data behind it if it is packed."""
    return data.unpacked if isinstance(data, PackedData) else data
