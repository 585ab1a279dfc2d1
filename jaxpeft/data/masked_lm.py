"""Masked language modelling: text in blocks of one length, and masks that are a pure function of (seed, micro-step).

The masks are BERT's (Devlin et al. 2018, section 3.1): a share of the tokens is chosen, of which 80 % become [MASK],
10 % a random token and 10 % stay. Unlike BERT's, they are drawn anew for every epoch (RoBERTa's dynamic masking). The
number of masked positions is the same for every row, so the model computes logits only at those positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np

from jaxpeft.data.masks import Batch, choose_masks, masked_batch, not_special, num_masked
from jaxpeft.data.order import FILL, MASK_STREAM, cut, epoch_order, num_batches
from jaxpeft.data.token_cache import Chunk, Origin, TokenCache, tokenised
from jaxpeft.data.whole_words import word_starts
from jaxpeft.errors import InputError

WIKITEXT_UNKNOWN = "<unk>"
EVALUATION_SEED = 20181011  # constant, so that runs of different seeds are evaluated on the same masks
_TEXTS_PER_CALL = 1024
_ROWS_PER_DRAW = 1024  # rows per draw of evaluation masks: not the batch size, which must not change the masks


def make_blocks(texts: Sequence[str], tokenizer: Any, *, length: int, cache: TokenCache | None = None) -> np.ndarray:
    """Join the texts and cut them into rows of [CLS] + `length - 2` tokens + [SEP].

    WikiText's literal `<unk>` becomes the tokenizer's unknown token. The incomplete last row is padded if it fills at
    least a quarter of the length, or if it is the only row. Otherwise it is dropped.

    Args:
      texts: any number of texts; blank ones add no tokens.
      tokenizer: a transformers tokenizer with [CLS], [SEP], [PAD] and [MASK].
      length: tokens per row, including special ones. This function does not know the model's own limit.
      cache: keeps the rows for later calls, if `texts` are a `TextColumn`.

    Returns:
      `[rows, length]` int32, read-only if it comes from the cache.

    Raises:
      InputError: there are no tokens, the length is below 3, or the tokenizer lacks one of the special tokens.
    """
    _check_length(length)
    require_special_tokens(tokenizer)
    origin = Origin("blocks", (texts,), tokenizer, length)
    rows = tokenised(origin, ("input_ids",), partial(_chunks_of_blocks, texts, tokenizer, length), cache)
    return rows.tokens["input_ids"].reshape(-1, length)


def _chunks_of_blocks(texts: Sequence[str], tokenizer: Any, length: int) -> Iterator[Chunk]:
    body, num_full, left = length - 2, 0, np.zeros(0, np.int32)
    for tokens in _token_stream(texts, tokenizer):
        tokens = np.concatenate([left, tokens])
        cut_at = len(tokens) // body * body
        if cut_at:
            yield _framed(tokens[:cut_at].reshape(-1, body), tokenizer)
        num_full, left = num_full + cut_at // body, tokens[cut_at:]
    if len(left) and (num_full == 0 or 4 * (len(left) + 2) >= length):
        last = _framed(left[None], tokenizer).tokens["input_ids"]
        padding = np.full(length - len(last), tokenizer.pad_token_id, np.int32)
        yield Chunk({"input_ids": np.concatenate([last, padding])}, np.array([length]))
    elif num_full == 0:
        raise InputError(f"the {len(texts)} texts hold no tokens; give text that is not blank")


def _framed(bodies: np.ndarray, tokenizer: Any) -> Chunk:
    """Rows of [CLS] + `bodies`, `[rows, n]` int32, + [SEP]."""
    num_rows, width = bodies.shape
    blocks = np.empty((num_rows, width + 2), np.int32)
    blocks[:, 0], blocks[:, 1:-1], blocks[:, -1] = tokenizer.cls_token_id, bodies, tokenizer.sep_token_id
    return Chunk({"input_ids": blocks.reshape(-1)}, np.full(num_rows, width + 2))


def check_options(ratio: float, batch_size: int, length: int) -> None:
    """Raise InputError if the ratio is outside (0, 1], the batch size below 1, or the length below 3."""
    if not 0 < ratio <= 1:
        raise InputError(
            f"mask ratio {ratio} is not a share of the tokens; give one above 0 and at most 1, such as 0.15"
        )
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is too small; give at least 1")
    _check_length(length)


def _check_length(length: int) -> None:
    if length < 3:
        raise InputError(f"length {length} leaves no room for a token between [CLS] and [SEP]; give at least 3")


def require_special_tokens(tokenizer: Any) -> None:
    """Raise InputError if the tokenizer has no [CLS], [SEP], [PAD] or [MASK]."""
    for role in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, f"{role}_id") is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no {role}; masked language modelling needs a BERT-like one"
            )


def _token_stream(texts: Sequence[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """The tokens of all texts without special tokens, `[n]` int32, in pieces."""
    unknown = tokenizer.unk_token or WIKITEXT_UNKNOWN
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = [text.replace(WIKITEXT_UNKNOWN, unknown) for text in texts[start : start + _TEXTS_PER_CALL]]
        # verbose=False: transformers would warn of texts above the model's limit, but they are cut into blocks anyway.
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32)


@dataclass(frozen=True, eq=False)
class MaskedLMData:
    """Blocks and their masks. Every method is a pure function of the fields and its arguments.

    `blocks` are `[rows, length]` int32. The other fields are those of `choose_masks`. All batches have the same shapes: an
    incomplete last batch is padded with copies of row 0 whose weights are 0. If `evaluated_rows` is given, only so many are evaluated.
    """

    blocks: np.ndarray
    batch_size: int
    ratio: float
    mask_token_id: int
    pad_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    seed: int
    word_starts: np.ndarray | None = None
    evaluated_rows: int | None = None

    @property
    def can_mask(self) -> np.ndarray:
        """`[rows, length]` bool, True if a token may be masked (`maskable`)."""
        return not_special(self.blocks, self.special_ids)

    @property
    def num_positions(self) -> int:
        """P, the static number of masked positions per row."""
        return num_masked(self.blocks.shape[1], self.ratio)

    @property
    def batches_per_epoch(self) -> int:
        """Batches per epoch. The last one may be padded."""
        return num_batches(len(self.blocks), self.batch_size)

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The only (batch, length) pair of training and evaluation, so each of them is one compiled program."""
        return {(self.batch_size, self.blocks.shape[1])}

    def train_batch(self, micro_step: int) -> Batch:
        """The batch of a micro-step, counted from 0 over all epochs.

        Rows are permuted anew in each epoch, and masks are drawn anew in each micro-step. Shapes are as in `mask_rows`.
        """
        return self.assemble(self.device_data, self.draw(micro_step), np)

    @property
    def device_data(self) -> Batch:
        """Arrays shared by all batches, from which `assemble` gathers: `blocks`, `[rows, length]` int32."""
        return {"blocks": self.blocks}

    def draw(self, micro_step: int) -> Batch:
        """Indices of the batch of a micro-step: its `rows`, `[batch]` int32, and their masks (`choose_masks`)."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        rows = epoch_order(len(self.blocks), self.batch_size, self.seed, epoch)[index]
        return self.masked_draw(rows, np.random.default_rng([self.seed, MASK_STREAM, micro_step]))

    def masked_draw(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        """A draw of the given rows, `[batch]` int with -1 for no row."""
        real = np.maximum(rows, 0)  # FILL reads row 0, whose weights become 0 below
        masks = self._masks(real, rng)
        weights = np.where((rows == FILL)[:, None], np.float32(0), masks["weights"])
        return {**masks, "rows": real.astype(np.int32), "weights": weights}

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """The batch of a `draw`, in arrays of the namespace `xp`: numpy, or jax.numpy inside a compiled program."""
        return self.masked(device_data["blocks"][draw["rows"]], draw, xp)

    def masked(self, rows: Any, masks: Any, xp: Any) -> dict[str, Any]:
        """The batch of token ids `rows` with `masks` applied (`mask_rows`)."""
        return masked_batch(rows, masks, self.pad_token_id, xp)

    def eval_batches(self) -> Iterator[Batch]:
        """Every row once, in order. The masks depend only on the blocks, not on the seed or the batch size."""
        for rows, masks in self.evaluation_draws():
            yield self.masked(self.blocks[rows], masks, np)

    @property
    def evaluation_order(self) -> np.ndarray:
        """The rows in the order of evaluation, `[rows]` int."""
        return np.arange(len(self.blocks))

    def evaluation_draws(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """For each evaluation batch its rows, `[batch]` int (row 0 in the place of none), and their masks, which are always the same."""
        order = self.evaluation_order
        masks_of = lru_cache(maxsize=2)(
            partial(self._evaluation_masks, order)
        )  # a batch may begin in one group and end in the next
        for places in cut(np.arange(len(order))[: self.evaluated_rows], self.batch_size):
            yield order[np.maximum(places, 0)], self._masks_at(places, masks_of)

    def _masks_at(self, places: np.ndarray, masks_of: Callable[[int], Batch]) -> Batch:
        real = np.maximum(places, 0)
        starts = real // _ROWS_PER_DRAW * _ROWS_PER_DRAW
        masks: Batch = {}
        for start in np.unique(starts).tolist():
            here = starts == start
            for name, values in masks_of(start).items():
                masks.setdefault(name, np.empty((len(places), *values.shape[1:]), values.dtype))
                masks[name][here] = values[real[here] - start]
        masks["weights"][places == FILL] = 0
        return masks

    def _evaluation_masks(self, order: np.ndarray, start: int) -> Batch:
        # Drawn for groups of fixed size, or the masks would depend on the batch size.
        rows = order[start : start + _ROWS_PER_DRAW]
        return self._masks(rows, np.random.default_rng([EVALUATION_SEED, start]))

    def with_seed(self, seed: int) -> MaskedLMData:
        """The same rows, in the order and with the masks of another seed."""
        return replace(self, seed=seed)

    def sample(self, num_rows: int) -> MaskedLMData:
        """The same data, of which only the first `num_rows` rows are evaluated, with the same masks as before."""
        return replace(self, evaluated_rows=num_rows)

    def head(self, num_rows: int) -> MaskedLMData:
        """Only the first `num_rows` rows."""
        return replace(self, blocks=self.blocks[:num_rows])

    def single_mask_batches(self) -> Iterator[Batch]:
        """Each maskable token masked in a copy of its row (P = 1), for pseudo-perplexity (Salazar et al. 2020, eq. 1).

        A row is repeated for each of its maskable tokens, so this is about `length` times the work of `eval_batches`.
        """
        where = np.argwhere(self.can_mask)
        for chosen in cut(np.arange(len(where)), self.batch_size):
            rows, positions = where[np.maximum(chosen, 0)].T
            originals = self.blocks[rows]
            input_ids = originals.astype(np.int32)
            input_ids[np.arange(len(rows)), positions] = self.mask_token_id
            yield {
                "input_ids": input_ids,
                "attention_mask": (originals != self.pad_token_id).astype(np.int32),
                "positions": positions[:, None].astype(np.int32),
                "labels": originals[np.arange(len(rows)), positions][:, None].astype(np.int32),
                "weights": (chosen != FILL)[:, None].astype(np.float32),
            }

    def _masks(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        blocks = self.blocks[rows]
        return choose_masks(
            blocks,
            not_special(blocks, self.special_ids),
            rng=rng,
            ratio=self.ratio,
            num_positions=self.num_positions,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            special_ids=self.special_ids,
            word_starts=self.word_starts,
        )


def masked_lm_data(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    ratio: float,
    seed: int,
    whole_words: bool = False,
    cache: TokenCache | None = None,
) -> MaskedLMData:
    """Encode texts as `MaskedLMData`. Arguments are as in `make_blocks` and `mask_rows`; `seed` is the run's (0 or above).
    `whole_words` masks the tokens of a word together.

    Raises InputError if the ratio is outside (0, 1] or the batch size below 1, and as `make_blocks`.
    """
    check_options(ratio, batch_size, length)
    blocks = make_blocks(texts, tokenizer, length=length, cache=cache)
    return MaskedLMData(
        blocks=blocks,
        batch_size=batch_size,
        ratio=ratio,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        seed=seed,
        word_starts=word_starts(tokenizer) if whole_words else None,
    )
