"""A run's configuration: every flag with its unit and default, checked on construction.

A config file holds the same keys as YAML. This module imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxpeft.config.adapter import AdapterConfig, PruningConfig
from jaxpeft.config.checks import check_choices, check_combinations, check_ranges
from jaxpeft.config.contextual import ContextualConfig
from jaxpeft.config.data import DataConfig
from jaxpeft.config.embedding import EmbeddingConfig
from jaxpeft.config.model import ModelConfig
from jaxpeft.config.training import ClusterConfig, EvaluationConfig, TrainingConfig
from jaxpeft.tasks import FLAG_VALUES, TASKS

# `--help` lists the names of the table. The test is negated, because jsonargparse executes the block of a plain
# `if TYPE_CHECKING` and would then accept any string.
if not TYPE_CHECKING:  # noqa: SIM108
    TaskName = Literal[FLAG_VALUES]
else:
    TaskName = str


@dataclass(frozen=True)
class RunConfig:
    """One fine-tuning run."""

    name: str | None = None
    """Name of the run. Its files go to output_dir/name; null: made from model, data and method."""
    output_dir: str = "runs"
    """Directory of all runs."""
    task: TaskName = "masked-lm"
    """Task (docs/tasks.md): masked language modelling; one class or number for a text or pair; several classes; a score for a
    query and a text; a tag for each word (NER, POS); the part of a text that answers a question; or the vector of a text."""
    seed: int = 0
    """Seed of every random draw: new weights, order, masks, dropout."""
    resume: bool = False
    """Continue the run of this name from its last checkpoint."""
    distributed: bool = False
    """Train on several hosts (a TPU pod) with jax.distributed.initialize(). All hosts run the same command and share output_dir."""
    compilation_cache: str | None = "auto"
    """Directory of compiled programs for later runs; auto: JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxpeft/compiled; null: no cache."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    contextual: ContextualConfig = field(default_factory=ContextualConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        """Raise InputError for a configuration that cannot be run, before anything is loaded."""
        TASKS.check(self.task)
        parts = vars(self)
        ranged = (
            *("model", "data", "adapter", "pruning", "contextual", "embedding", "training", "evaluation", "cluster"),
            "seed",
        )
        combined = (
            *("task", "output_dir", "distributed", "model", "data", "adapter", "pruning", "contextual", "training"),
            *("embedding", "cluster"),
        )
        chosen = ("model", "adapter", "pruning", "contextual", "embedding", "training")
        check_choices(**{name: parts[name] for name in chosen})
        check_ranges(**{name: parts[name] for name in ranged})
        check_combinations(**{name: parts[name] for name in combined})

    def resolved(self) -> dict[str, Any]:
        """The configuration as plain values, ready for YAML, without the settings of a single call.

        These are `resume`, `compilation_cache`, `distributed` and `cluster`. Without them one host can, for example, resume a run
        that several hosts saved.
        """
        values = asdict(self)
        for key in ("resume", "compilation_cache", "distributed", "cluster"):
            del values[key]
        del values["training"]["steps_per_dispatch"]  # an old name, whose value is under the new one
        return values

    @property
    def task_options(self) -> dict[str, Any]:
        """The flags that belong to the task alone (`Task.options_from`), by name; {} if it has none."""
        section = TASKS[self.task].options_from
        return dict(vars(getattr(self, section))) if section else {}

    @property
    def run_name(self) -> str:
        """The run's `name` or, if it is None, a name made from model, data and method."""
        if self.name:
            return self.name
        model = self.model.name.rstrip("/").removesuffix("/config.json").split("/")[-1]
        data = (self.data.name or (self.data.train_file or "data").split("/")[-1].rsplit(".", 1)[0]).replace("/", "-")
        if self.data.glob:
            data = re.sub(r"[^\w.]+", "-", data).strip("-") or "files"
        sparse = "sparse-" if self.pruning.sparsity else ""
        quantized = "q" if self.model.quantization != "none" else ""
        contextual = "contextual-" if self.contextual.is_on else ""
        return f"{model}-{data}-{contextual}{sparse}{quantized}{self.adapter.method}"
