"""The input of training steps: draws, which the host makes in advance, and batches, which the program assembles from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.training.objective import Batch
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import Metrics, TrainState, TrainStep, make_train_steps
from jaxpeft.trees import Params

Draw = Mapping[str, np.ndarray]
"""The random part of a micro-step's batch: which rows, which masks. If the data is not on the devices, the whole batch."""

DEVICE_DATA_LIMIT_BYTES = 2**29
"""Data of at most this size is kept on every device (134 million tokens)."""

Summed = Callable[[TrainState, Params, Sequence[int]], Any]
"""Sums over micro-steps, which it takes by number. The state stays as it is."""


class Data(Protocol):
    """A training set (`jaxpeft.data`). A batch is a pure function of the micro-step.

    It is made as a whole on the host (`train_batch`), or in two parts: `draw` on the host, `assemble` in the program.
    """

    @property
    def device_data(self) -> Mapping[str, np.ndarray]:
        """The arrays from which all batches are made."""

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The (rows, tokens per row) pairs of training batches."""

    def draw(self, micro_step: int) -> Draw:
        """The random part of the batch of `micro_step`."""

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """The batch of a draw, in arrays of the namespace `xp` (numpy or jax.numpy)."""

    def train_batch(self, micro_step: int) -> Batch:
        """The batch of `micro_step`, made on the host."""


@dataclass(frozen=True)
class InputPipeline:
    """The source of a run's batches.

    Attributes:
        draw_at: micro-step → draw, on the host.
        assemble: `(device_data, draw) → batch`, inside the program.
        device_data: the arrays from which all batches are made, on the devices.
        place: puts stacked draws, `[micro-steps, …]`, on the devices.
        longest: makes a draw of the longest rows. Only its shape means something.
    """

    draw_at: Callable[[int], Draw]
    assemble: Callable[[Any, Any], Batch]
    device_data: Any
    place: Callable[[Any], Any]
    longest: Callable[[], Draw]

    def train_steps(self, step: TrainStep, most: int) -> TrainProgram:
        """A function that dispatches up to `most` micro-steps of `step` at once. One compiled program serves any number of them."""
        return TrainProgram(make_train_steps(step, self.assemble), self, most)

    def summed(self, function: Callable[[TrainState, Params, Batch, jax.Array], Any]) -> Summed:
        """A function that sums trees over micro-steps: `function(state, frozen, batch, micro_step)` for the batch of each."""

        @jax.jit
        def program(state: TrainState, frozen: Params, device_data: Any, draws: Any, micro_step: jax.Array) -> Any:
            draw = jax.tree.map(lambda stacked: stacked[0], draws)
            return function(state, frozen, self.assemble(device_data, draw), micro_step)

        def run(state: TrainState, frozen: Params, micro_steps: Sequence[int]) -> Any:
            total = None
            for micro_step in micro_steps:
                draws = self.place({name: np.asarray(array)[None] for name, array in self.draw_at(micro_step).items()})
                found = program(state, frozen, self.device_data, draws, np.int32(micro_step))
                total = found if total is None else _add(total, found)
            return total

        return run


@dataclass(frozen=True)
class TrainProgram:
    """Runs one micro-step for each draw, in one dispatch. Only the first `len(draws)` entries of the metrics are valid."""

    program: Any
    pipeline: InputPipeline
    most: int

    def __call__(self, state: TrainState, frozen: Params, draws: list[Draw]) -> tuple[TrainState, Metrics]:
        """Run the micro-steps. `state` is donated."""
        return self.program(*self._arguments(state, frozen, draws))

    def compiled_for_longest(self, state: TrainState, frozen: Params) -> jax.stages.Compiled:
        """The program for the longest rows, compiled. A call of the program then does not compile it again."""
        return self.program.lower(*self._arguments(state, frozen, [self.pipeline.longest()])).compile()

    def _arguments(self, state: TrainState, frozen: Params, draws: list[Draw]) -> tuple[Any, ...]:
        filled = draws + [draws[-1]] * (self.most - len(draws))
        stacked = {name: np.stack([draw[name] for draw in filled]) for name in draws[0]}
        return state, frozen, self.pipeline.device_data, self.pipeline.place(stacked), np.int32(len(draws))


@partial(jax.jit, donate_argnums=0)
def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


def make_input_pipeline(
    data: Data, parallel: DataParallel, *, limit_bytes: int = DEVICE_DATA_LIMIT_BYTES
) -> InputPipeline:
    """The pipeline of `data`. Data of at most `limit_bytes` is kept on the devices; of larger data, whole batches are sent."""
    device_data = data.device_data
    if not fits(device_data, limit_bytes):
        return InputPipeline(
            data.train_batch,
            lambda device_data, batch: batch,
            {},
            partial(parallel.shard, axis=1),
            lambda: data.assemble(device_data, longest_draw(data), np),
        )
    return InputPipeline(
        data.draw,
        in_program(data, parallel),
        parallel.replicate(dict(device_data)),
        parallel.replicate,
        lambda: longest_draw(data),
    )


def longest_draw(data: Data) -> Draw:
    """A draw with the shape of the longest rows."""
    return draw_of_length(data, max(length for _, length in data.batch_shapes))


def draw_of_length(data: Data, length: int) -> Draw:
    """A draw with the shape of the rows of `length` tokens, if rows have several lengths; else of the only one."""
    draw = data.draw(0)
    return {**draw, "columns": np.arange(length, dtype=np.int32)} if "columns" in draw else draw


def fits(device_data: Mapping[str, np.ndarray], limit_bytes: int = DEVICE_DATA_LIMIT_BYTES) -> bool:
    """True if the data is small enough to keep it on the devices."""
    return sum(array.nbytes for array in device_data.values()) <= limit_bytes


def in_program(data: Data, parallel: DataParallel) -> Callable[[Any, Any], Batch]:
    """The function `(device_data, draw) → batch` to trace into a program, with the batch split over the devices."""
    return parallel.split(lambda device_data, draw: data.assemble(device_data, draw, jnp))


class Prefetched:
    """A context manager with the draws of `micro_steps`. A thread makes up to `depth` of them in advance."""

    def __init__(self, draw_at: Callable[[int], Draw], micro_steps: range, *, depth: int) -> None:
        self._draw_at, self._left = draw_at, iter(micro_steps)
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draws")
        self._made: deque[Future[Draw]] = deque()
        for _ in range(depth):
            self._order()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._maker.shutdown(cancel_futures=True)

    def take(self, most: int) -> list[Draw]:
        """The next draws, at least one and at most `most`. They all have one shape, so that one program can run them."""
        draws = [self._next()]
        while len(draws) < most and self._made and _shapes(self._made[0].result()) == _shapes(draws[0]):
            draws.append(self._next())
        return draws

    def _next(self) -> Draw:
        draw = self._made.popleft().result()
        self._order()
        return draw

    def _order(self) -> None:
        number = next(self._left, None)
        if number is not None:
            self._made.append(self._maker.submit(self._draw_at, number))


def _shapes(draw: Draw) -> Any:
    return jax.tree.map(np.shape, dict(draw))
