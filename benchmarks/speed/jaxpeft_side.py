"""jaxpeft's side: the library's own `fit` on a case, one log interval at a time. Imports jax.

A round times all that a run does from one log point to the next: batch indices, dispatch, the compiled steps, and the metrics that leave
the device at the end. The loop waits for its next round in the place of a validation. The loop does not count the time of a validation,
so the waiting does not change how many micro-steps it dispatches at once.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import tomllib
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.speed.cases import Case, OurMethod
from benchmarks.speed.configuration import run_config
from benchmarks.speed.flops import Shape
from benchmarks.speed.rounds import ROOT
from jaxpeft.models.attention import attention_dropout
from jaxpeft.models.last_layer import last_layer
from jaxpeft.runs.micro_batches import decide
from jaxpeft.runs.setup import setup_run
from jaxpeft.training.checkpoint import Progress
from jaxpeft.training.input_pipeline import make_input_pipeline
from jaxpeft.training.loop import RunState, fit
from jaxpeft.training.micro_batches import WHOLE, MicroBatches
from jaxpeft.training.step import make_eval_step, make_train_step
from jaxpeft.trees import count


class Rounds:
    """Takes the place of a run's log, progress bar, checkpoints and validation."""

    def __init__(self) -> None:
        self._go: queue.Queue[bool] = queue.Queue()
        self._done: queue.Queue[Any] = queue.Queue()
        self._metrics: dict[str, float] = {}

    def take(self) -> tuple[float, dict[str, float]]:
        """Let the loop do one log interval; return its seconds and metrics."""
        started = time.perf_counter()
        self._go.put(True)
        metrics = self._done.get()
        seconds = time.perf_counter() - started
        if isinstance(metrics, BaseException):
            raise metrics
        return seconds, metrics

    def run(self, loop: Any) -> None:
        """Start `loop`, a function without arguments, in a thread that waits for the first round."""

        def body() -> None:
            self._go.get()
            try:
                loop()
            except BaseException as error:
                self._done.put(error)

        threading.Thread(target=body, daemon=True).start()

    def validate(self, state: Any) -> dict[str, float]:
        """In place of a validation: hand over the interval's metrics and wait for the next round."""
        self._done.put(self._metrics)
        self._go.get()
        return {"loss": 0.0, "accuracy": 0.0}

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """In place of a log: keep the interval's metrics."""
        if split == "train":
            self._metrics = metrics

    def advance(self, step: int) -> None:
        """In place of a progress bar: do nothing."""

    def show(self, step: int, **figures: float) -> None:
        """In place of a progress bar: do nothing."""

    def save(self, *args: Any) -> None:
        """In place of checkpoints: do nothing."""


class Trainer:
    """A case and a method, made ready as `runs.train.run` makes a run ready."""

    def __init__(self, case: Case, method: str | OurMethod, workload: Path) -> None:
        parts = setup_run(run_config(case, method, workload))
        self._model, self._data, self._objective = parts.model, parts.train_data, parts.objective
        self._frozen = parts.frozen
        flash = parts.objective.flash
        if flash and (case.length < flash.min_length or attention_dropout(parts.model)):
            flash = None  # as `Objective` chooses in training
        self.attention = f"flash, {flash.kernel}" if flash else "dense"
        self.steps_per_round = case.steps_per_round or self._data.batches_per_epoch
        # A log point, and a validation in which the loop waits, at the end of every round.
        plan = replace(parts.plan, log_every_steps=self.steps_per_round, eval_every_steps=self.steps_per_round)
        state = parts.initial_state()
        self._state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        training, source = parts.config.training, make_input_pipeline(self._data, parts.parallel)

        @cache
        def train_step(micro_batches: MicroBatches) -> Any:
            return make_train_step(
                self._objective,
                parts.optimizer,
                allocation=plan.allocation,
                max_grad_norm=training.max_grad_norm,
                micro_batches=micro_batches,
            )

        @cache
        def train_steps(micro_batches: MicroBatches) -> Any:
            return source.train_steps(train_step(micro_batches), plan.micro_steps_per_dispatch)

        def compiled(micro_batches: MicroBatches) -> Any:
            return train_steps(micro_batches).compiled_for_longest(state, self._frozen)

        self._train_step = train_step(WHOLE)  # XLA counts the operations of only one pass
        self.trainable = count(parts.adapted.adapters)
        self.first_loss = self._loss(parts.adapted.adapters, workload)
        self._work = self._count_work()
        self._rounds = Rounds()
        micro_batches, _ = decide(
            training,
            parts.parallel,
            Progress(),
            self._data,
            compiled,
            model=parts.model,
            trained=parts.adapted.adapters,
            virtual_tokens=parts.objective.virtual_tokens,
        )
        rows, length = max(self._data.batch_shapes, key=math.prod)
        self._work["rows_per_pass"] = micro_batches.rows_of(rows, length).in_pass
        self._rounds.run(lambda: self._fit(state, plan, source.draw_at, train_steps(micro_batches)))

    def _fit(self, state: Any, plan: Any, draw_at: Any, train_steps: Any) -> None:
        rounds: Any = self._rounds  # stands in for checkpoints, a log and a bar
        fit(
            state,
            self._frozen,
            [RunState(plan, Progress(), state, rounds.validate, checkpoints=rounds, metrics_log=rounds)],
            draw_at=draw_at,
            train_steps=train_steps,
            bar=rounds,
            stop_requested=lambda: None,
        )

    def run_round(self) -> tuple[float, float]:
        """Train for `steps_per_round` steps; return their seconds and their mean loss."""
        seconds, metrics = self._rounds.take()
        return seconds, metrics["loss"]

    def work(self) -> dict[str, Any]:
        """Steps, texts, real tokens and computed shapes of a round. All rounds are alike."""
        return self._work

    def _count_work(self) -> dict[str, Any]:
        batches = [self._data.train_batch(i) for i in range(self.steps_per_round)]
        return {
            "updates": self.steps_per_round,
            "rows": sum(int(_real(batch).sum()) for batch in batches),
            "tokens": sum(_real_tokens(batch) for batch in batches),
            "shapes": [[*vars(shape).values()] for shape in self._shapes(batches)],
        }

    def counted_flops(self) -> float:
        """XLA's own count of the operations of a step: mean over a round."""
        batches = {
            batch["input_ids"].shape: batch for batch in map(self._data.train_batch, range(self.steps_per_round))
        }
        shapes = Counter(self._data.train_batch(i)["input_ids"].shape for i in range(self.steps_per_round))
        total = 0.0
        for shape, batch in batches.items():
            compiled = self._train_step.lower(self._state, self._frozen, dict(batch)).compile()
            total += shapes[shape] * compiled.cost_analysis()["flops"]
        return total / self.steps_per_round

    def _loss(self, adapters: Any, workload: Path) -> float:
        """The loss of the first batch before any step, without dropout."""
        batch = dict(np.load(workload / "check.npz"))
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
    """Which rows of a batch hold a text, rather than fill the batch up: bool, True = a text."""
    return np.asarray(batch["weights"]).reshape(len(batch["weights"]), -1).max(1) > 0


def _real_tokens(batch: Any) -> int:
    mask = np.asarray(batch["attention_mask"]) > 0
    # A packed batch has no rows that only fill it up.
    return int(mask.sum() if "segments" in batch else mask[_real(batch)].sum())


def about() -> dict[str, Any]:
    """The device and the versions."""
    from importlib.metadata import version

    device = jax.devices()[0]
    checkout = tomllib.loads((ROOT / "pyproject.toml").read_text())  # it need not be installed
    return {
        "device": "cpu" if device.platform == "cpu" else "gpu",
        "device_name": device.device_kind,
        "versions": {"jaxpeft": checkout["project"]["version"]}
        | {name: version(name) for name in ("jax", "flax", "transformers")},
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
