"""Masked language modelling: predict the masked tokens of a text (Devlin et al. 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import MaskedLMData, Split, masked_lm_data, num_masked
from jaxpeft.errors import InputError
from jaxpeft.tasks.base import Answers, Batch, RowOptions, Take, Task, most_likely, tokenize
from jaxpeft.tasks.metrics import perplexity


@dataclass(frozen=True)
class MaskedLM(Task):
    """Predicts masked tokens. Logits are computed only at the masked positions of a batch: `[rows, positions, vocabulary]`."""

    name = "masked-lm"
    title = "masked language modelling"
    head = "masked-lm"
    pipeline_tag = "fill-mask"
    auto_class = "AutoModelForMaskedLM"
    known_metrics = ("loss", "perplexity", "accuracy")
    reported_metrics = ("perplexity", "accuracy")
    reads_labels = False
    trains_head = False
    fills_masks = True
    example = "This is a great [MASK]!"

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> MaskedLM:
        """The same task for any data: labels are not read, and the loss decides."""
        return cls(None, cls.known_metrics)

    def make_data(self, split: Split, tokenizer: Any, rows: RowOptions, *, batch_size: int, seed: int) -> MaskedLMData:
        """The texts joined and cut into rows of `rows.max_length` tokens."""
        return masked_lm_data(
            split.texts,
            tokenizer,
            length=rows.max_length,
            batch_size=batch_size,
            seed=seed,
            ratio=rows.mask_ratio,
            cache=rows.token_cache,
        )

    def tokens_read(self, batch: Batch, virtual_tokens: int = 0) -> Take | None:
        """Takes the tokens at `batch["positions"]: [rows, positions]`. None (all tokens) if the batch has no such key."""
        positions = batch.get("positions")
        return None if positions is None else partial(take_positions, positions=positions + virtual_tokens)

    def places_read(self, batch: Batch, virtual_tokens: int = 0) -> jax.Array | None:
        """The masked positions of every row."""
        positions = batch.get("positions")
        return None if positions is None else positions + virtual_tokens

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy in nats, `[rows, positions]`."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

    def outputs(self, logits: jax.Array) -> None:
        """None: logits over a vocabulary would be too large to send to the host."""
        return None

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None
    ) -> dict[str, float]:
        """`loss` in nats per masked token, `perplexity` = exp(loss), and `accuracy` on masked tokens."""
        loss = sums["loss"] / sums["weight"]
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": sums["correct"] / sums["weight"]}

    def eval_batches(self, data: MaskedLMData, most: int | None) -> Iterable[Batch]:
        """The first batches, at most `most` if it is given. Rows are blocks of running text in their order."""
        return islice(data.eval_batches(), most)

    def single_mask_batches(self, data: MaskedLMData, num_rows: int) -> Iterable[Batch]:
        """Batches in which every token of the first `num_rows` rows is masked once, by itself (Salazar et al. 2020, equation 1)."""
        return data.head(num_rows).single_mask_batches()

    def encode(
        self, texts: Sequence[str], tokenizer: Any, *, num_positions: int, virtual_tokens: int = 0
    ) -> dict[str, np.ndarray]:
        """`texts` as one batch with `positions: [texts, largest number of masks]` and the number of masks, `num_masks: [texts]`.

        Raises:
            InputError: a text has no mask, or is too long.
        """
        texts = [text.replace("[MASK]", tokenizer.mask_token) for text in texts]
        encoded = tokenize(texts, tokenizer, num_positions=num_positions, virtual_tokens=virtual_tokens)
        is_mask = encoded["input_ids"] == tokenizer.mask_token_id
        for text, row in zip(texts, is_mask, strict=True):
            if not row.any():
                raise InputError(f"'{text}' has no {tokenizer.mask_token} to fill")
        positions = np.zeros((len(texts), is_mask.sum(1).max()), np.int32)
        for i, row in enumerate(is_mask):
            positions[i, : row.sum()] = np.flatnonzero(row)
        return {**encoded, "positions": positions, "num_masks": is_mask.sum(1)}

    def answer(
        self, logits: np.ndarray, batch: Batch, tokenizer: Any, label_names: Sequence[str] | None, top: int
    ) -> list[list[Answers]]:
        """For every text and mask the `top` most likely tokens."""
        return [
            [most_likely(logits[i, j], tokenizer.convert_ids_to_tokens, top) for j in range(number)]
            for i, number in enumerate(batch["num_masks"].tolist())
        ]

    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of token ids and mask, `[batch_size, length]`, and of `positions`, `labels` and `weights`, `[batch_size, positions]`."""
        ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        places = (batch_size, num_masked(length, rows.mask_ratio))
        labels = jax.ShapeDtypeStruct(places, jnp.int32)
        weights = jax.ShapeDtypeStruct(places, jnp.float32)
        return {"input_ids": ids, "attention_mask": ids, "positions": labels, "labels": labels, "weights": weights}

    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """One length, `rows.max_length`, because all rows are full."""
        return (rows.max_length,)

    def dummy_data(self, rows: RowOptions, batch_size: int, *, vocab_size: int, seed: int) -> MaskedLMData:
        """Dummy rows for one batch. The program does not depend on their number or values."""
        shape = (batch_size, rows.max_length)
        return MaskedLMData(
            np.zeros(shape, np.int32),
            batch_size,
            rows.mask_ratio,
            mask_token_id=0,
            pad_token_id=0,
            vocab_size=vocab_size,
            special_ids=(),
            seed=seed,
        )

    def torch_lines(self, sentence: str) -> list[str]:
        """Lines of Python that print the most likely token of the first mask."""
        return [
            f'text = {sentence!r}.replace("[MASK]", tokenizer.mask_token)',
            'inputs = tokenizer(text, return_tensors="pt")',
            "mask = (inputs.input_ids == tokenizer.mask_token_id).nonzero()[0, 1]",
            "print(tokenizer.decode(model(**inputs).logits[0, mask].argmax()))",
        ]

    def notes(self, rows: RowOptions) -> list[str]:
        """The definition of perplexity in these figures."""
        return [
            f"Perplexity is exp of the mean loss over exactly {100 * rows.mask_ratio:g} % of the real tokens of every row, with fixed "
            "evaluation masks."
        ]


def take_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Take `x: [batch, seq, d]` at `positions: [batch, p]`: `[batch, p, d]`."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)
