"""Flags of training, evaluation and several hosts: `--training.*`, `--evaluation.*` and `--cluster.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxpeft.config.old_names import read_old_name


@dataclass(frozen=True)
class TrainingConfig:
    """The training. A step is one optimizer step; a micro-step computes the gradients of one batch."""

    num_steps: int | None = None
    """Steps in total; null: num_epochs decides."""
    num_epochs: float = 3.0
    """Passes over the training rows, if num_steps is null."""
    batch_size: int = 16
    """Rows per micro-step, over all devices together."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Rows per pass, over all devices together. auto: as many as memory and speed allow. It changes no result (README, "Micro-batches")."""
    accumulation_steps: int = 1
    """Micro-steps per step; their gradients are averaged."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW. HiRA needs a far larger one than LoRA."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: ratio of the learning rate of B and of vectors to that of A, at least 1; null: one rate for all."""
    loraplus_lr_embedding: float = 1e-6
    """LoRA+: peak learning rate of adapted embeddings."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up: it falls to 0 linearly or as a cosine, or stays constant."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0; null: a tenth of the run, but at most 100."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; biases and norms are not decayed."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes (classification). Like class_weights, it is part of the loss that training
    minimises and logs; validation and test losses stay plain cross-entropy."""
    class_weights: Literal["balanced"] | list[float] | dict[str, float] | None = None
    """Weights of the classes in training (classification): name → weight, such as '{spam: 3}' (1 for the others), a list in the order
    of the ids, or balanced: rows / (classes × rows of the class). The loss of a batch is divided by its labels' weights."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped; 0: no clipping."""
    micro_steps_per_dispatch: int = 10
    """Maximum micro-steps per compiled call. Fewer are used if a call would exceed 20 s, since a stop signal waits for two calls."""
    steps_per_dispatch: int | None = None
    """Old name of micro_steps_per_dispatch."""
    log_every_steps: int = 10
    """Steps between two log lines; metrics leave the device only then."""
    eval_every_steps: int | None = None
    """Steps between two validations, each with a checkpoint; null: ten validations per run."""
    early_stopping_patience: int | None = None
    """Number of validations without improvement after which the run stops; null: never."""
    metric: str | None = None
    """Validation metric that selects the best adapter, one of those that the run reports, such as loss or f1; null: the task's own."""

    def __post_init__(self) -> None:
        """Read old names, and the names of classes as text: YAML takes those of ids as numbers."""
        read_old_name(self, "steps_per_dispatch", "micro_steps_per_dispatch")
        if isinstance(self.class_weights, dict):
            named = {str(name): weight for name, weight in self.class_weights.items()}
            object.__setattr__(self, "class_weights", named)


@dataclass(frozen=True)
class EvaluationConfig:
    """How validation and test rows are measured."""

    batch_size: int = 32
    """Rows per evaluation batch, over all devices together."""
    max_batches: int | None = None
    """Maximum validation batches during training: the first ones, or in classification a fixed random choice; null: all."""
    max_test_batches: int | None = None
    """Maximum test batches, chosen in the same way and noted in the results; null: all, as in published figures."""
    before: bool = True
    """Also evaluate the initial model on the test set. Off by default in `compare`."""
    pseudo_perplexity: bool = False
    """Also measure pseudo-perplexity, masking one token at a time (Salazar et al. 2020). Each token costs as much as a row."""
    pseudo_perplexity_rows: int = 100
    """Test rows used for pseudo-perplexity."""
    examples: list[str] = field(default_factory=list)
    """Sentences with a [MASK] to fill in before and after training (masked-lm)."""


@dataclass(frozen=True)
class ClusterConfig:
    """Addresses of several hosts. null: the value that jax.distributed.initialize() detects (Cloud TPU, Slurm, Open MPI)."""

    coordinator_address: str | None = None
    """host:port of process 0, which all other hosts can reach; null: JAX_COORDINATOR_ADDRESS, or detected."""
    num_processes: int | None = None
    """Processes in total, one per host."""
    process_id: int | None = None
    """This process's number, from 0."""
