"""What is asked of a model: one file for each task, on one contract (`base.py`). Reading the names here imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxpeft.registry import Registry

if TYPE_CHECKING:
    from jaxpeft.tasks.base import Task

TASKS = Registry(
    "task",
    {
        "masked-lm": "jaxpeft.tasks.masked_lm:MaskedLM",
        "classification": "jaxpeft.tasks.classification:Classification",
        "regression": "jaxpeft.tasks.regression:Regression",
    },
)
"""Name → class."""

FLAG_VALUES = tuple(name for name in TASKS if name != "regression")
"""What `--task` takes. A classification whose labels are numbers becomes a regression by itself (`Classification.for_labels`)."""


def task_for(name: str, num_labels: int | None = None) -> Task:
    """The task called `name`, for data with `num_labels` classes (1: numbers; None: no labels).

    Raises:
        InputError: for an unknown name.
    """
    return TASKS[name].for_labels(num_labels)
