"""Masked language modelling: predict the masked tokens of a text (Devlin et al. 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import MaskedLMData, Split, masked_lines, masked_lm_data, num_masked
from jaxpeft.data.classification import cap_buckets
from jaxpeft.data.order import cut
from jaxpeft.tasks.base import Answers, Batch, Questions, RowError, Take, Task, in_percent, most_likely
from jaxpeft.tasks.metrics import perplexity
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline

_MULTIPLE = 16


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
    reads_pairs = False
    trains_head = False
    fills_masks = True
    own_flags = ("whole_word_masking", "join_texts")
    example = "This is a great [MASK]!"

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> MaskedLM:
        """The same task for any data: labels are not read, and the loss decides."""
        return cls(None, cls.known_metrics)

    def make_data(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> MaskedLMData:
        """The texts joined and cut into rows of `max_length` tokens or, without `join_texts`, a row for each text."""
        rows = pipeline.rows
        options: dict[str, Any] = {
            "length": rows.max_length,
            "batch_size": batch_size,
            "seed": seed,
            "ratio": rows.mask_ratio,
            "whole_words": rows.whole_word_masking,
            "cache": rows.token_cache,
        }
        if rows.join_texts:
            return masked_lm_data(split.texts, pipeline.tokenizer, **options)
        return masked_lines(split.texts, pipeline.tokenizer, bucket_lengths=rows.bucket_lengths, **options)

    def make_questions(self, split: Split, pipeline: TextPipeline, *, batch_size: int, top: int | None) -> Questions:
        """Texts with [MASK] or the tokenizer's own mask. An answer has for each mask the `top` most likely tokens.

        Raises:
            InputError: a text has no mask, or has more tokens than the model has positions. It is not cut, because masks could be lost.
        """
        pipeline.check(split)
        tokenizer = pipeline.tokenizer
        encoded, num_masks = _encode(list(split.texts), pipeline)
        batches = [
            _batch(encoded, rows, tokenizer, pipeline.num_positions) for rows in cut(np.arange(len(split)), batch_size)
        ]

        def answers(outputs: Iterable[np.ndarray]) -> list[Any]:
            # Row by row, because logits over a vocabulary are large. Rows behind the last text are copies.
            logits = (row for output in outputs for row in output)
            return [
                [most_likely(row[j], tokenizer.convert_ids_to_tokens, top) for j in range(number)]
                for number, row in zip(num_masks, logits, strict=False)
            ]

        return Questions(batches, answers)

    def in_words(self, answer: list[Answers]) -> list[str]:
        """A line for each mask."""
        places = [f"mask {i + 1}: " for i in range(len(answer))] if len(answer) > 1 else [""]
        return [place + in_percent(tokens) for place, tokens in zip(places, answer, strict=True)]

    def as_record(self, answer: list[Answers]) -> dict[str, Any]:
        """`masks`: for each mask a list of tokens with their probabilities."""
        return {"masks": [[{"token": token, "probability": p} for token, p in tokens] for tokens in answer]}

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
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss` in nats per masked token, `perplexity` = exp(loss), and `accuracy` on masked tokens."""
        loss = sums["loss"] / sums["weight"]
        return {"loss": loss, "perplexity": perplexity(loss), "accuracy": sums["correct"] / sums["weight"]}

    def single_mask_batches(self, data: MaskedLMData, num_rows: int) -> Iterable[Batch]:
        """Batches in which every token of the first `num_rows` rows is masked once, by itself (Salazar et al. 2020, equation 1)."""
        return data.head(num_rows).single_mask_batches()

    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of token ids and mask, `[batch_size, length]`, and of `positions`, `labels` and `weights`, `[batch_size, positions]`."""
        ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        places = (batch_size, num_masked(length, rows.mask_ratio))
        labels = jax.ShapeDtypeStruct(places, jnp.int32)
        weights = jax.ShapeDtypeStruct(places, jnp.float32)
        return {"input_ids": ids, "attention_mask": ids, "positions": labels, "labels": labels, "weights": weights}

    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """One length, `rows.max_length`, if all rows are full; else the bucket lengths."""
        return (rows.max_length,) if rows.join_texts else cap_buckets(rows.bucket_lengths, rows.max_length)

    def dummy_data(self, rows: RowOptions, batch_size: int, *, vocab_size: int, seed: int) -> MaskedLMData | None:
        """Dummy rows for one batch, or None without `join_texts`. The program does not depend on their number or values."""
        if not rows.join_texts:
            return None
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

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
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
            f"Perplexity is exp of the mean loss over {'at most' if rows.whole_word_masking else 'exactly'} {100 * rows.mask_ratio:g} % "
            f"of the real tokens of every row{', in whole words' if rows.whole_word_masking else ''}, with fixed evaluation masks."
        ]


def take_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Take `x: [batch, seq, d]` at `positions: [batch, p]`: `[batch, p, d]`."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)


def _encode(texts: list[str], pipeline: TextPipeline) -> tuple[list[list[int]], list[int]]:
    """The token ids of `texts` and their numbers of masks."""
    tokenizer, limit = pipeline.tokenizer, pipeline.num_positions
    texts = [text.replace("[MASK]", tokenizer.mask_token) for text in texts]
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    num_masks = [ids.count(tokenizer.mask_token_id) for ids in encoded]
    for i, (text, ids, number) in enumerate(zip(texts, encoded, num_masks, strict=True)):
        if not number:
            raise RowError(i, f"'{text}' has no {tokenizer.mask_token} to fill")
        if len(ids) > limit:
            raise RowError(
                i, f"'{text[:40]}…' has {len(ids)} tokens; the model has {limit} positions for a text: shorten it"
            )
    return encoded, num_masks


def _batch(encoded: list[list[int]], rows: np.ndarray, tokenizer: Any, num_positions: int) -> dict[str, np.ndarray]:
    """The texts `rows` (-1: a copy of text 0 in its place) as a batch, with the masks' `positions: [texts, masks]`.

    Texts are padded at the end, to a multiple of 16 tokens or to `num_positions`; positions with 0, to a power of two. So few programs
    are compiled.
    """
    chosen = [np.asarray(encoded[max(row, 0)], np.int32) for row in rows]
    longest = max(map(len, chosen))
    length = min(-(-longest // _MULTIPLE) * _MULTIPLE, num_positions)
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros_like(ids)
    for i, tokens in enumerate(chosen):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    places = [np.flatnonzero(row == tokenizer.mask_token_id) for row in ids]
    most = max(map(len, places))
    positions = np.zeros((len(rows), 1 << (most - 1).bit_length()), np.int32)
    for i, found in enumerate(places):
        positions[i, : len(found)] = found
    return {"input_ids": ids, "attention_mask": mask, "positions": positions}
