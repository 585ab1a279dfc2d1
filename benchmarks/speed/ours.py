"""Our side: the library's own `fit` on a case, let on one log interval at a time. Imports jax.

What a turn times is what a run does from one log point to the next: draws, dispatch, the compiled updates, and the metrics that leave the
device at its end. The loop waits for its next turn in the place of a validation, whose time it leaves out of its own figures, by which
it decides how much to dispatch at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.speed.cases import Case
from benchmarks.speed.configuration import run_config
from benchmarks.speed.flops import Shape
from jaxpeft.models.last_layer import last_layer
from jaxpeft.runs.setup import setup_run
from jaxpeft.training.checkpoint import Progress
from jaxpeft.training.input_pipeline import make_input_pipeline
from jaxpeft.training.loop import RunState, fit
from jaxpeft.training.step import make_eval_step, make_train_step
from jaxpeft.trees import count


class Turns:
    """Stands where a run's log, bar, checkpoints and validation stand."""

    def __init__(self) -> None:
        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()
        self._metrics: dict[str, float] = {}

    def take(self) -> tuple[float, dict[str, float]]:
        """Let the loop do one log interval; its seconds and metrics."""
        started = time.perf_counter()
        self._go.put(True)
        metrics = self._done.get()
        seconds = time.perf_counter() - started
        if isinstance(metrics, BaseException):
            raise metrics
        return seconds, metrics

    def run(self, loop: Any) -> None:
        """Start `loop`, a function without arguments, in a thread that waits for the first turn."""

        def body() -> None:
            self._go.get()
            try:
                loop()
            except BaseException as error:
                self._done.put(error)

        threading.Thread(target=body, daemon=True).start()

    def validate(self, state: Any) -> dict[str, float]:
        """As a validation: the interval is done; wait for the next turn."""
        self._done.put(self._metrics)
        self._go.get()
        return {"loss": 0.0, "accuracy": 0.0}

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """As a log: keep the interval's metrics."""
        if split == "train":
            self._metrics = metrics

    def advance(self, step: int) -> None:
        """As a bar: nothing."""

    def show(self, step: int, **figures: float) -> None:
        """As a bar: nothing."""

    def save(self, *args: Any) -> None:
        """As checkpoints: nothing."""


class Trainer:
    """A case and a method, made ready as `runs.train.run` makes a run ready."""

    def __init__(self, case: Case, method: str, material: Path) -> None:
        parts = setup_run(run_config(case, method, material))
        self._model, self._data, self._objective = parts.model, parts.train_data, parts.objective
        self._frozen = parts.frozen
        self.updates_per_turn = case.updates_per_turn or self._data.steps_per_epoch
        # A log point, and a validation in which the loop waits, at the end of every turn.
        plan = replace(parts.plan, log_every_steps=self.updates_per_turn, eval_every_steps=self.updates_per_turn)
        state = parts.initial_state()
        self._state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        self._train_step = make_train_step(
            self._objective,
            parts.optimizer,
            allocation=plan.allocation,
            max_grad_norm=parts.config.training.max_grad_norm,
        )
        self.trainable = count(parts.adapted.adapters)
        self.first_loss = self._loss(parts.adapted.adapters, material)
        self._work = self._count_work()
        self._turns = Turns()
        self._turns.run(lambda: self._fit(state, plan, make_input_pipeline(self._data, parts.parallel)))

    def _fit(self, state: Any, plan: Any, source: Any) -> None:
        turns: Any = self._turns  # stands in for checkpoints, a log and a bar
        fit(
            state,
            self._frozen,
            [RunState(plan, Progress(), state, turns.validate, checkpoints=turns, metrics_log=turns)],
            draw_at=source.draw_at,
            train_steps=source.train_steps(self._train_step, plan.micro_steps_per_dispatch),
            bar=turns,
            stop_requested=lambda: None,
        )

    def turn(self) -> tuple[float, float]:
        """Train for `updates_per_turn` updates; their seconds, and their mean loss."""
        seconds, metrics = self._turns.take()
        return seconds, metrics["loss"]

    def work(self) -> dict[str, Any]:
        """Of a turn: updates, texts, real tokens, and the shapes that are computed; every turn's are alike."""
        return self._work

    def _count_work(self) -> dict[str, Any]:
        batches = [self._data.train_batch(i) for i in range(self.updates_per_turn)]
        return {
            "updates": self.updates_per_turn,
            "rows": sum(int(_real(batch).sum()) for batch in batches),
            "tokens": sum(_real_tokens(batch) for batch in batches),
            "shapes": [[*vars(shape).values()] for shape in self._shapes(batches)],
        }

    def counted_flops(self) -> float:
        """XLA's own count of the operations of an update: mean over a turn."""
        batches = {
            batch["input_ids"].shape: batch for batch in map(self._data.train_batch, range(self.updates_per_turn))
        }
        shapes = Counter(self._data.train_batch(i)["input_ids"].shape for i in range(self.updates_per_turn))
        total = 0.0
        for shape, batch in batches.items():
            compiled = self._train_step.lower(self._state, self._frozen, dict(batch)).compile()
            total += shapes[shape] * compiled.cost_analysis()["flops"]
        return total / self.updates_per_turn

    def _loss(self, adapters: Any, material: Path) -> float:
        """The loss of the first batch before any update, without dropout."""
        batch = dict(np.load(material / "check.npz"))
        statistics, _ = make_eval_step(self._objective)(self._frozen, adapters, {}, batch)
        return float(statistics["loss"] / statistics["weight"])

    def _shapes(self, batches: list[Any]) -> list[Shape]:
        shapes: Counter = Counter()
        for batch in batches:
            rows, length = batch["input_ids"].shape
            # Tokens a row that the head reads: the masked ones, or the first of each of its texts.
            head = batch["labels"].size / rows
            queries = head if last_layer(self._model, lambda x: x) and "segments" not in batch else length
            shapes[rows, length, head, head if self._model.behind_attention else length, queries] += 1
        return [Shape(*shape, count) for shape, count in shapes.items()]


def _real(batch: Any) -> np.ndarray:
    """Which texts of a batch are none that fill it up: bool."""
    return np.asarray(batch["weights"]).reshape(len(batch["weights"]), -1).max(1) > 0


def _real_tokens(batch: Any) -> int:
    mask = np.asarray(batch["attention_mask"]) > 0
    # With several texts in a row, no row is there to fill the batch up.
    return int(mask.sum() if "segments" in batch else mask[_real(batch)].sum())


def about() -> dict[str, Any]:
    """The device and the versions."""
    from importlib.metadata import version

    device = jax.devices()[0]
    return {
        "device": "cpu" if device.platform == "cpu" else "gpu",
        "device_name": device.device_kind,
        "versions": {name: version(name) for name in ("jaxpeft", "jax", "flax", "transformers")},
    }


def device_memory() -> int | None:
    """Peak bytes on the device; None on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def matrix_rate(m: int, k: int, n: int, *, dtype: str, repeats: int) -> float:
    """Operations a second of `[m, k] × [k, n]`, mean over `repeats` in a row."""
    a, b = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(m, k), (k, n)]))
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    started = time.perf_counter()
    for _ in range(repeats):
        out = product(a, b)
    out.block_until_ready()
    return repeats * 2 * m * k * n / (time.perf_counter() - started)
