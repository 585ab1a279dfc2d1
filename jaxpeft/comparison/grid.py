"""The grid of a comparison: methods × tasks × seeds × learning rates from one file, as configurations of ordinary runs.

This module imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxpeft.config import DataConfig, RunConfig
from jaxpeft.config.adapter import redraws_entries
from jaxpeft.config.files import run_config
from jaxpeft.config.old_names import read_old_name
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.tasks import TASKS

ALWAYS: dict[str, dict[str, Any]] = {
    "full": {"learning_rates": [2e-5, 5e-5, 1e-4], "adapter": {"method": "full"}},
    "head": {"learning_rates": [1e-3, 3e-3, 1e-2], "adapter": {"method": "head"}},
}
"""Every comparison also has these two extremes as rows (but not head if the task has none). A file may replace the learning rates."""

_LEARNING_RATE_OF_COSTS = 1e-5  # time and memory do not depend on it, and no method diverges at this one
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class ForgettingConfig:
    """Forgetting: masked-LM perplexity of the encoder on text of another kind, before and after training."""

    data: DataConfig = field(default_factory=lambda: DataConfig(name="python-docs"))
    """General text. Its test rows are measured. Its training rows train a masked-LM head if the base's checkpoint has none."""
    max_rows: int = 200
    """Maximum rows of max_length tokens to read."""
    head_steps: int = 300
    """Steps to train that head, on the frozen base."""
    head_learning_rate: float = 3e-3
    """Peak learning rate of that head."""

    def __post_init__(self) -> None:
        """Raise InputError for numbers below 1."""
        for name, value in (("max_rows", self.max_rows), ("head_steps", self.head_steps)):
            if value < 1:
                raise InputError(f"forgetting.{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of methods on tasks."""

    tasks: dict[str, dict[str, Any]]
    """Task → keys of a run's configuration: task, data, training, evaluation."""
    methods: dict[str, dict[str, Any]]
    """Method → keys of a run's configuration, and learning_rates: a list, or task → list. full and head are always included."""
    name: str = "comparison"
    """Name of the comparison. Its files go to output_dir/name."""
    output_dir: str = "runs"
    """Directory of all runs."""
    base: dict[str, Any] = field(default_factory=dict)
    """Keys of a run's configuration that all runs share. A task's keys override them, and a method's override both."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds. Each method is trained once with each, at its best learning rate."""
    search_seeds: int = 1
    """Number of seeds, from the first, that are trained at every learning rate. The best mean on validation decides."""
    baseline: str = "lora"
    """Method to which the others are compared, on the same seeds."""
    together: int = 8
    """Maximum runs that train in one program, if they may share one; 1: each run trains by itself."""
    cost_steps: int = 40
    """Steps of the separate run on which each method's speed, memory and compile time are measured."""
    cost_updates: int | None = None
    """Old name of cost_steps."""
    forgetting: ForgettingConfig | None = field(default_factory=ForgettingConfig)
    """How to measure forgetting; null: not measured."""
    retry_failed: bool = False
    """Train runs again that failed before; false: they stay failures in the report."""

    def __post_init__(self) -> None:
        """Raise InputError for a comparison that cannot be run. Read old names."""
        read_old_name(self, "cost_updates", "cost_steps")
        checks = [
            ("tasks", self.tasks, bool(self.tasks), "at least one task"),
            ("seeds", self.seeds, self.seeds and len(set(self.seeds)) == len(self.seeds), "different numbers, at least one"),
            ("search_seeds", self.search_seeds, 1 <= self.search_seeds <= len(self.seeds), f"from 1 to {len(self.seeds)} (seeds)"),
            ("together", self.together, self.together >= 1, "at least 1"),
            ("cost_steps", self.cost_steps, self.cost_steps >= 20, "at least 20"),
        ]  # fmt: skip
        for flag, value, fine, wanted in checks:
            if not fine:
                raise InputError(f"{flag} is {value}; it must be {wanted}")
        names = self.all_methods
        for name in (*self.tasks, *names):
            if not _NAME.fullmatch(name):
                raise InputError(f"'{name}' becomes part of file names; use only letters, digits, '-', '_' and '.'")
        for name in ALWAYS:
            if (method := names[name]["adapter"].get("method")) != name:
                raise InputError(
                    f"methods.{name}.adapter.method is '{method}'; the name '{name}' is reserved for method '{name}': choose another name"
                )
        if self.baseline not in names:
            raise InputError(f"baseline '{self.baseline}' is not among the methods{did_you_mean(self.baseline, names)}")
        for task in self.tasks:
            for method in self.methods_of(task):
                self.learning_rates(task, method)
        cells = [cell.name for cell in search_cells(self)]
        if twice := next((name for name in cells if cells.count(name) > 1), None):
            raise InputError(
                f"two runs would have the name '{twice}'; rename tasks or methods so that run names are unique"
            )

    @cached_property
    def parsed(self) -> dict[tuple[str, str], RunConfig]:
        """(task, method) → the configuration that its runs share, once it was parsed, which takes 50 times as long as changing a seed."""
        return {}

    @property
    def directory(self) -> Path:
        """The directory of the comparison's files: output_dir/name."""
        return Path(self.output_dir) / self.name

    @property
    def all_methods(self) -> dict[str, dict[str, Any]]:
        """The methods with full and head, in the file's order."""
        return {**self.methods, **{name: merged(ALWAYS[name], self.methods.get(name, {})) for name in ALWAYS}}

    def methods_of(self, task: str) -> list[str]:
        """The names of the methods that are trained on `task`: all, but not head if the task has none."""
        kind = merged(self.base, self.tasks[task]).get("task", RunConfig.task)
        has_head = kind not in TASKS or TASKS[kind].has_head
        return [name for name in self.all_methods if has_head or name != "head"]

    def learning_rates(self, task: str, method: str) -> list[float]:
        """The learning rates to try for a method on a task, ascending.

        Raises:
            InputError: the file gives none, or values that are no numbers.
        """
        named = self.all_methods[method].get("learning_rates")
        rates = named.get(task) if isinstance(named, Mapping) else named
        where = f"methods.{method}.learning_rates"
        if not rates:
            raise InputError(f"{where} has none for task '{task}'; give a list of numbers, or one list per task")
        try:
            return sorted({float(rate) for rate in rates})
        except (TypeError, ValueError):
            raise InputError(f"{where} is {rates}; give a list of numbers such as [3e-4, 1e-3]") from None


@dataclass(frozen=True, order=True)
class Cell:
    """One run's place in the grid."""

    task: str
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The run's name, made from all four fields."""
        return f"{self.task}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}"


def search_cells(config: CompareConfig) -> list[Cell]:
    """The runs that choose the learning rates: every rate with the first `search_seeds` seeds."""
    return [
        Cell(task, method, rate, seed)
        for task in config.tasks
        for method in config.methods_of(task)
        for seed in config.seeds[: config.search_seeds]
        for rate in config.learning_rates(task, method)
    ]


def cells_at(config: CompareConfig, best: Mapping[tuple[str, str], float]) -> list[Cell]:
    """The runs of all seeds for every (task, method) in `best`, which holds its learning rate."""
    return [Cell(task, method, rate, seed) for (task, method), rate in best.items() for seed in config.seeds]


def run_of(config: CompareConfig, cell: Cell) -> RunConfig:
    """The configuration of a cell's run.

    Raises:
        InputError: as `RunConfig`. The message names the task and the method.
    """
    run = _run_without_cell(config, cell.task, cell.method)
    return replace(
        run, name=cell.name, seed=cell.seed, training=replace(run.training, learning_rate=cell.learning_rate)
    )


def cost_run(config: CompareConfig, task: str, method: str) -> RunConfig:
    """A short run of a method, in a process of its own, to measure speed, memory and compile time."""
    run = _run_without_cell(config, task, method)
    adapter, redraws = run.adapter, redraws_entries(run.adapter, run.pruning)
    if adapter.method == "adalora":  # AdaLoRA's schedule must fit into so few steps
        adapter = replace(adapter, tinit=2, tfinal=2, deltaT=1)
    training = replace(
        run.training,
        num_steps=config.cost_steps,
        warmup_steps=2,
        # Several log intervals, because the first one and those that compile are not counted in the speed.
        log_every_steps=max(1, config.cost_steps // 8),
        eval_every_steps=config.cost_steps,
        early_stopping_patience=None,
        learning_rate=_LEARNING_RATE_OF_COSTS,
    )
    return replace(
        run,
        name=f"{task}-{method}",
        output_dir=str(config.directory / "costs"),
        seed=config.seeds[0],
        adapter=adapter,
        training=training,
        evaluation=replace(
            run.evaluation, max_batches=1, max_test_batches=1, before=False, pseudo_perplexity=False, examples=[]
        ),
        # Pruning must also take place within the short run. Some schedules have no `begin`. A redraw takes as long as a step, so it
        # must be rarer.
        pruning=replace(run.pruning, begin=None, end=0.5, every_steps=config.cost_steps // 5 if redraws else 2),
    )


def _run_without_cell(config: CompareConfig, task: str, method: str) -> RunConfig:
    """The configuration that all runs of a method on a task share, but for the name, the seed and the learning rate."""
    if (task, method) not in config.parsed:
        own = {key: value for key, value in config.all_methods[method].items() if key != "learning_rates"}
        ours = {"evaluation": {"before": False}}  # the report does not read it
        where = f"task '{task}', method '{method}'"
        run = run_config(merged(ours, config.base, config.tasks[task], own), where)
        config.parsed[task, method] = replace(run, output_dir=str(config.directory / "runs"))
    return config.parsed[task, method]


def head_run(config: CompareConfig) -> RunConfig:
    """The run that trains a masked-LM head on the frozen base, for `ForgettingConfig`."""
    assert config.forgetting
    f = config.forgetting
    values = {
        "name": "general-text-head",
        "output_dir": str(config.directory),
        "task": "masked-lm",
        "data": vars(f.data),
        "adapter": {"method": "head"},
        "training": {
            "num_steps": f.head_steps,
            "learning_rate": f.head_learning_rate,
            "warmup_steps": f.head_steps // 10,
        },
    }
    # Only the model: the other shared keys are meant for the compared runs.
    base = {key: value for key, value in config.base.items() if key in ("model",)}
    return run_config(merged(base, values), "forgetting")


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings. Later ones override earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(result.get(key, {}), Mapping):
                value = merged(result.get(key, {}), value)
            result[key] = deepcopy(value)
    return result
