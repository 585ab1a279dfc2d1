"""What a task is: the contract that every file in this folder fulfils.

A task knows which rows it reads, which tokens its head needs, its loss, its metrics and how an answer is shown. It knows no model and no
adapter: those meet it in `jaxpeft.training.objective.Objective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.data import Split, Splits
from jaxpeft.errors import InputError

Batch = Mapping[str, Any]
"""Arrays of one micro-step, first axis the batch: token ids and mask, labels, weights. Rows or positions of weight 0 do not count."""

Answers = list[tuple[str, float]]
"""Tokens or labels with their probability, most likely first."""

Take = Callable[[jax.Array], jax.Array]
"""`[rows, length, d]` → `[rows, tokens, d]`: the tokens that a head reads."""


@dataclass(frozen=True)
class RowOptions:
    """How texts become rows: the flags of the same names in `data`."""

    max_length: int = 128
    mask_ratio: float = 0.15
    bucket_lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Task(ABC):
    """A task for data with `num_labels` classes (1: numbers to predict; None: no labels), judged by `metrics`, the deciding one first."""

    num_labels: int | None = None
    metrics: tuple[str, ...] = ()

    name: ClassVar[str]
    """The value of `--task`."""
    title: ClassVar[str]
    """The task in prose, such as "masked language modelling"."""
    head: ClassVar[str]
    """Which of transformers' models it needs: a key of `jaxpeft.models.build.HEADS`."""
    pipeline_tag: ClassVar[str]
    """The hub's name of the task."""
    auto_class: ClassVar[str]
    """The torch class that loads such a model, for the lines of the model card."""
    known_metrics: ClassVar[tuple[str, ...]]
    """All values that `training.metric` may have."""
    reported_metrics: ClassVar[tuple[str, ...]]
    """The metrics of a comparison's report, the deciding one first."""
    reads_labels: ClassVar[bool] = True
    """Whether the data must have labels."""
    can_pack: ClassVar[bool] = False
    """Whether several texts may share a training row."""
    trains_head: ClassVar[bool] = True
    """Whether the head always trains whole, as PEFT's sequence classifiers do; else only if the checkpoint lacks it."""
    fills_masks: ClassVar[bool] = False
    """Whether an answer fills the masks of a text."""
    example: ClassVar[str] = "This is a great movie!"
    """A text to try a finished run on."""

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> Task:
        """The task for data with `num_labels`; `headline_metrics` are those that a benchmark's authors report."""
        return cls(num_labels, tuple(headline_metrics) or cls.reported_metrics)

    def check_data(self, splits: Splits) -> None:
        """Raise InputError if the rows in `splits` cannot be judged by this task."""
        if self.reads_labels and splits.num_labels is None:
            raise InputError(
                f"{self.name} needs labels, and {splits.source} has none; name their column with data.label_column"
            )

    @abstractmethod
    def make_data(self, split: Split, tokenizer: Any, rows: RowOptions, *, batch_size: int, seed: int) -> Any:
        """Tokenise `split` into batches of `batch_size` rows; `seed` decides the order of training.

        The result has the methods of `jaxpeft.training.input_pipeline.Data` and `eval_batches()`.
        """

    @abstractmethod
    def tokens_read(self, batch: Batch, virtual_tokens: int = 0) -> Take | None:
        """The tokens of `batch` that the head reads; None: all of them. `virtual_tokens` stand in front of every row."""

    @abstractmethod
    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The loss of every label, shaped like `batch["labels"]`."""

    def loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum, weight) of the losses in fp32: batches of unequal weight add up exactly, and weight 0 is safe."""
        weights = batch["weights"]
        return (self.losses(logits, batch) * weights).sum(), weights.sum()

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Sums over a batch that metrics are made of: `loss`, `weight` and `correct`."""
        total, weight = self.loss(logits, batch)
        right = logits.argmax(-1) == batch["labels"]
        return {"loss": total, "weight": weight, "correct": jnp.where(right, batch["weights"], 0.0).sum()}

    def outputs(self, logits: jax.Array) -> jax.Array | None:
        """What the host needs of `logits` to compute metrics; None: the statistics suffice."""
        return logits

    @abstractmethod
    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None
    ) -> dict[str, float]:
        """`loss` and the metrics, from summed statistics and, if the task has `outputs`, those and the labels, `[rows, …]`."""

    def eval_batches(self, data: Any, most: int | None) -> Iterable[Batch]:
        """The batches to judge by, at most `most` of them if it is given."""
        if most:
            data = data.sample(most * data.batch_size)
        return data.eval_batches()

    def single_mask_batches(self, data: Any, num_rows: int) -> Iterable[Batch] | None:
        """Batches for pseudo-perplexity on `num_rows` rows; None if the task has no such figure."""
        return None

    @abstractmethod
    def encode(
        self, texts: Sequence[str], tokenizer: Any, *, num_positions: int, virtual_tokens: int = 0
    ) -> dict[str, np.ndarray]:
        """A batch of a user's own `texts`, for a model with `num_positions` besides `virtual_tokens`.

        Raises:
            InputError: for a text that cannot be answered.
        """

    @abstractmethod
    def answer(
        self, logits: np.ndarray, batch: Batch, tokenizer: Any, label_names: Sequence[str] | None, top: int
    ) -> list[Any]:
        """For every text of `encode`'s `batch` its `Answers`, or a list of them, one for each mask."""

    @abstractmethod
    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of an evaluation batch of `batch_size` rows of `length` tokens."""

    @abstractmethod
    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """Tokens a row of the batches that training may see, ascending; each is a program of its own."""

    def dummy_data(self, rows: RowOptions, batch_size: int, *, vocab_size: int, seed: int) -> Any | None:
        """Data of the right shapes without reading any; None if the shapes depend on the data."""
        return None

    def torch_lines(self, sentence: str) -> list[str]:
        """Lines of Python for the model card that ask a torch `model` with its `tokenizer` about `sentence`."""
        return [f'inputs = tokenizer({sentence!r}, return_tensors="pt")', "print(model(**inputs).logits.softmax(-1))"]

    def notes(self, rows: RowOptions) -> list[str]:
        """How the figures were measured, one sentence each, for the model card."""
        return []


def most_likely(logits: np.ndarray, names: Callable[[list[int]], Sequence[str]], top: int) -> Answers:
    """The `top` largest of `logits: [classes]` with their softmax probabilities."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    return list(zip(names(best.tolist()), probabilities[best].tolist(), strict=True))


def tokenize(
    texts: Sequence[str], tokenizer: Any, *, num_positions: int, virtual_tokens: int = 0
) -> dict[str, np.ndarray]:
    """`texts` as one batch of token ids, padded to a multiple of 16 tokens or to `num_positions`.

    Raises:
        InputError: for a text of more than `num_positions` tokens.
    """
    encoded = tokenizer(list(texts), padding=True, pad_to_multiple_of=16, return_tensors="np")
    lengths = encoded["attention_mask"].sum(1)
    if lengths.max() > num_positions:
        text = texts[int(lengths.argmax())]
        besides = " besides the prompt's" if virtual_tokens else ""
        raise InputError(
            f"'{text[:40]}…' has {lengths.max()} tokens; the model has {num_positions} positions{besides}: shorten it"
        )
    return {key: value[:, :num_positions].astype(np.int32) for key, value in encoded.items()}
