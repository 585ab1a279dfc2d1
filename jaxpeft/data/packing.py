"""Packing, for training classifiers: several short texts share a row, so a batch is a few full rows, not many short ones.

Texts are sorted by length and cut into `batch_size` strata. Every batch takes one text of each stratum, so all batches
have nearly the same number of tokens. The place of a stratum in the batch is chosen once, for the longest text of the
stratum, so every text fits in every epoch. The whole run thus has one shape and one compiled program. A text attends only
to its own tokens (block-diagonal attention, `segments`), and its positions start at 0 (Krell et al. 2021,
arXiv 2107.02027, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxpeft.data.classification import Batch, ClassificationData
from jaxpeft.data.order import FILL, order_rng

PER_TEXT = ("labels", "weights", "starts")
"""The arrays of a packed batch that have texts first, not rows."""


def first_fit_decreasing(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Pack items of `lengths`, none above `room`, into bins of `room`. Returns the items of each bin, longest first.

    Each item, the longest first, goes to the first bin that has room. This uses at most 11/9 of the fewest bins
    (Dósa 2007).
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        place = next((i for i, free in enumerate(left) if free >= lengths[item]), len(bins))
        if place == len(bins):
            bins.append([])
            left.append(room)
        bins[place].append(item)
        left[place] -= int(lengths[item])
    return bins


@dataclass(frozen=True, eq=False)
class Layout:
    """The place of each text in a batch, the same for every batch.

    Attributes:
      strata: `[batch]` int, the stratum of each text; texts are in the order of their rows.
      rows: `[batch]` int, the row of each text, ascending.
      num_rows: rows per batch.
      length: tokens per row.
    """

    strata: np.ndarray
    rows: np.ndarray
    num_rows: int
    length: int


def shortest_layout(limits: np.ndarray, max_length: int, num_devices: int) -> Layout:
    """The layout with the fewest tokens. Candidates are rows of `max_length` and of each multiple of 8 below it.

    Among equal layouts the one with the shortest rows wins: attention computes a score for every pair of tokens in a
    row, so short rows cost less.
    """
    lengths = [*range(-(-int(limits.max()) // 8) * 8, max_length, 8), max_length]
    layouts = [lay_out(limits, length, num_devices) for length in lengths]
    return min(layouts, key=lambda layout: layout.num_rows * layout.length)


def lay_out(limits: np.ndarray, length: int, num_devices: int) -> Layout:
    """Place one text of each stratum in rows of `length`. Each text may be as long as the longest of its stratum.

    Args:
      limits: `[batch]` int, tokens of the longest text of each stratum, ascending.
      length: tokens per row.
      num_devices: number of equal parts of a batch. All parts have the same number of texts and of rows, and a text is
        in the same part as its row.
    """
    # Deal the longest first and reverse every second round, so that the parts get nearly the same number of tokens.
    dealt = np.arange(len(limits))[::-1].reshape(-1, num_devices)
    dealt[1::2] = dealt[1::2, ::-1]
    parts = [[part[bin_] for bin_ in first_fit_decreasing(limits[part], length)] for part in dealt.T]
    rows_each = max(map(len, parts))
    strata = np.concatenate([texts for part in parts for texts in part])
    rows = [
        np.full(len(texts), number * rows_each + row)
        for number, part in enumerate(parts)
        for row, texts in enumerate(part)
    ]
    return Layout(strata, np.concatenate(rows), num_devices * rows_each, length)


@dataclass(frozen=True, eq=False)
class PackedData:
    """Encoded texts, packed for training. Every method is a pure function of the fields and its arguments.

    Attributes:
      unpacked: the texts, their labels, the number of texts per batch and the seed.
      max_length: maximum tokens per row.
      num_devices: number of devices that share a batch.
    """

    unpacked: ClassificationData
    max_length: int
    num_devices: int = 1

    @property
    def batches_per_epoch(self) -> int:
        """Batches per epoch, as many as without packing. Instead of one incomplete batch, several lack one text."""
        return self.unpacked.batches_per_epoch

    @property
    def num_truncated(self) -> int:
        """Number of texts that were cut to the maximum length."""
        return self.unpacked.num_truncated

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The only (rows, length) pair of training, so there is one compiled program."""
        return {(self.layout.num_rows, self.layout.length)}

    @property
    def device_data(self) -> Batch:
        """Arrays shared by all batches, as in `ClassificationData`."""
        return self.unpacked.device_data

    def with_seed(self, seed: int) -> PackedData:
        """The same texts in the training order of another seed."""
        return replace(self, unpacked=self.unpacked.with_seed(seed))

    def train_batch(self, micro_step: int) -> Batch:
        """The batch of a micro-step, counted from 0 over all epochs.

        Per row, `[rows, length]` int32: `input_ids`; `attention_mask`; `token_type_ids`; `segments`, the number of the text
        a token belongs to, from 1, and 0 for padding; `position_ids`, from 0 in every text. Per text, `[texts]`: `labels`;
        `weights`, 0 for no text. `starts`: `[devices, texts / devices]` int32, the index of each text's first token in the
        concatenated rows of its device.
        """
        return self.assemble(self.device_data, self.draw(micro_step), np)

    def draw(self, micro_step: int) -> Batch:
        """Indices of the batch of a micro-step: its texts, `rows`: `[texts]` int32 (-1: none)."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        return {"rows": self._epoch(epoch)[index]}

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """The batch of a `draw`, in arrays of the namespace `xp`: numpy, or jax.numpy inside a compiled program."""
        texts, layout = xp.maximum(draw["rows"], 0), self.layout
        offsets, real = device_data["offsets"][texts], draw["rows"] != FILL
        lengths = xp.where(real, device_data["offsets"][texts + 1] - offsets, 0)
        # A text starts at the end of the texts before it in its row.
        before = xp.cumsum(lengths) - lengths
        first = np.searchsorted(layout.rows, layout.rows)  # for each text, the first text in the same row
        starts = (layout.rows * layout.length).astype(np.int32) + before - before[first]
        # For every slot of the batch: the text that owns it, and the place in that text.
        slots = np.arange(layout.num_rows * layout.length, dtype=np.int32)
        owner = xp.searchsorted(starts, slots, side="right") - 1
        places = slots - starts[owner]
        inside = places < lengths[owner]
        tokens = xp.where(inside, offsets[owner] + places, 0)

        def rows(values: Any, padding: int) -> Any:
            return xp.where(inside, values, padding).astype(xp.int32).reshape(layout.num_rows, layout.length)

        each = len(slots) // self.num_devices
        local = starts.reshape(self.num_devices, -1) - each * np.arange(self.num_devices, dtype=np.int32)[:, None]
        return {
            "input_ids": rows(device_data["input_ids"][tokens], self.unpacked.encoded.pad_token_id),
            "attention_mask": rows(1, 0),
            "token_type_ids": rows(device_data["token_type_ids"][tokens], 0),
            "segments": rows(owner + 1, 0),
            "position_ids": rows(places, 0),
            # A missing text behind a full last row would start beyond the device's rows.
            "starts": xp.minimum(local, each - 1).astype(xp.int32),
            "labels": device_data["labels"][texts],
            "weights": real.astype(xp.float32),
        }

    @cached_property
    def layout(self) -> Layout:
        """The place of each text in a batch, the same for every batch."""
        longest = self._strata[:, -1]
        limits = np.where(longest == FILL, 0, self.unpacked.encoded.lengths[longest])  # an empty stratum needs no room
        return shortest_layout(limits, self.max_length, self.num_devices)

    @cached_property
    def _strata(self) -> np.ndarray:
        """Texts by length, `[texts per batch, batches per epoch]`. Missing texts (`FILL`) count as the shortest."""
        order = np.argsort(self.unpacked.encoded.lengths, kind="stable")
        missing = self.unpacked.batch_size * self.batches_per_epoch - len(order)
        return np.concatenate([np.full(missing, FILL), order]).reshape(self.unpacked.batch_size, -1)

    # A mutable cell, because the dataclass is frozen.
    @cached_property
    def _last_epoch(self) -> dict[int, np.ndarray]:
        return {}

    def _epoch(self, epoch: int) -> np.ndarray:
        """One epoch's batches, `[micro-steps, texts]`. The last answer is kept, as every micro-step asks for the same."""
        plan = self._last_epoch.get(epoch)
        if plan is None:
            dealt = order_rng(self.unpacked.seed, epoch).permuted(self._strata, axis=1)
            plan = dealt[self.layout.strata].T.astype(np.int32)
            self._last_epoch.clear()
            self._last_epoch[epoch] = plan
        return plan
