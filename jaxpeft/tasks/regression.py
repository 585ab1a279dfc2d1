"""Regression: one number for each text or pair of texts, as in GLUE's STS-B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.data import Splits
from jaxpeft.errors import InputError
from jaxpeft.tasks.base import Answers, Batch, Task
from jaxpeft.tasks.classification import Classification


@dataclass(frozen=True)
class Regression(Classification):
    """Predicts one number for each text. Logits are `[texts, 1]`, the numbers themselves. All else is as in classification."""

    name = "regression"
    ranks_answers = False
    title = "regression"
    reported_metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")
    weighs_classes = False
    problem_type = "regression"

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> Task:
        """The regression, measured by both correlations."""
        return cls(1, cls.reported_metrics)

    def check_data(self, splits: Splits) -> None:
        """Raise InputError if the data has no labels, or a split for evaluation has fewer than two rows."""
        super().check_data(splits)
        for split in (splits.validation, splits.test):
            if split is not None and len(split) < 2:
                raise InputError(
                    f"{splits.source} leaves 1 row to judge a regression by, and a correlation needs two; add rows"
                )

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The squared error, `[texts]`."""
        return jnp.square(logits[..., 0] - batch["labels"])

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """`loss` and `weight`. There is no `correct`, because a number is not either right or wrong."""
        total, weight = self.loss(logits, batch)
        return {"loss": total, "weight": weight}

    def by_class(
        self, outputs: np.ndarray, labels: np.ndarray, label_names: Sequence[str] | None, data: Any = None
    ) -> None:
        """None, because numbers have no classes."""
        return None

    def answers(self, logits: np.ndarray, label_names: Sequence[str] | None, top: int | None) -> list[Answers]:
        """The number of every text, as a single answer with the name "value"."""
        return [[("value", float(row[0]))] for row in logits]

    def in_words(self, answer: Answers) -> list[str]:
        """The number."""
        return [f"{answer[0][1]:.3f}"]

    def as_record(self, answer: Answers) -> dict[str, Any]:
        """The number as `value`."""
        return dict(answer)

    @property
    def _label_dtype(self) -> Any:
        return jnp.float32

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
        """Lines of Python that print the number."""
        *lines, _ = super().torch_lines(sentence, pair)
        return [*lines, "print(model(**inputs).logits)"]
