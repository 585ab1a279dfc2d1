"""The tasks that a model can be trained for: one file per task, with the common interface in `base.py`. Names load no jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxpeft.registry import Registry

if TYPE_CHECKING:
    from jaxpeft.tasks.base import Task

TASKS = Registry(
    "task",
    {
        "masked-lm": "jaxpeft.tasks.masked_lm:MaskedLM",
        "classification": "jaxpeft.tasks.classification:Classification",
        "multi-label": "jaxpeft.tasks.multi_label:MultiLabel",
        "pair-scoring": "jaxpeft.tasks.pair_scoring:PairScoring",
        "question-answering": "jaxpeft.tasks.question_answering:QuestionAnswering",
        "regression": "jaxpeft.tasks.regression:Regression",
        "token-classification": "jaxpeft.tasks.token_classification:TokenClassification",
        "sentence-embeddings": "jaxpeft.tasks.sentence_embeddings:SentenceEmbeddings",
    },
)
"""Name → class."""

FLAG_VALUES = tuple(name for name in TASKS if name != "regression")
"""The values of `--task`. A classification turns into a regression if its labels are numbers (`Classification.for_labels`)."""


def task_for(name: str, num_labels: int | None = None, label_names: Sequence[str] | None = None) -> Task:
    """The task called `name`, for data with `num_labels` classes (1: numbers; None: no labels), and maybe with names for them.

    Raises:
        InputError: the name is unknown.
    """
    return TASKS[name].for_labels(num_labels).with_names(label_names)
