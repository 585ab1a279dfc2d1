"""Answers of an adapted model to a user's own texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpeft.tasks.base import Batch, Questions, for_device

Logits = Callable[[Batch], jax.Array]
"""`batch → logits` of an adapted model: a compiled program with its parameters."""


def answer(questions: Questions, logits: Logits) -> list[Any]:
    """The task's answer to each text of `questions`, in their order."""
    return questions.answers(np.asarray(logits(for_device(batch))) for batch in questions.batches)
