"""Flags of training, evaluation and several hosts: `--training.*`, `--evaluation.*` and `--cluster.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TrainingConfig:
    """How it is trained. One step is one update of the optimizer."""

    num_steps: int | None = None
    """Updates in total; null: num_epochs decides."""
    num_epochs: float = 3.0
    """Passes over the training rows, where num_steps is null."""
    batch_size: int = 16
    """Rows in one forward and backward pass, over all devices together."""
    accumulation_steps: int = 1
    """Passes whose gradients are averaged into one update."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW. HiRA wants a far larger one than LoRA."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: learning rate of B, and of vectors, over that of A, at least 1; null: one rate for all."""
    loraplus_lr_embedding: float = 1e-6
    """LoRA+: peak learning rate of adapted embeddings."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up: falls to 0 linearly or as a cosine, or stays."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay; biases and norms are spared."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0: not at all."""
    micro_steps_per_dispatch: int = 10
    """Maximum micro-steps per compiled call. Fewer are used if a call would exceed 20 s, since stop signals are handled between calls."""
    steps_per_dispatch: int | None = None
    """Old name of micro_steps_per_dispatch."""
    log_every_steps: int = 10
    """Updates between two log lines; metrics leave the device only then."""
    eval_every_steps: int | None = None
    """Updates between two validations, each with a checkpoint; null: ten times a run."""
    early_stopping_patience: int | None = None
    """Validations without a better metric after which the run stops; null: never."""
    metric: str | None = None
    """Validation metric that decides which adapter is best: loss, accuracy, f1, matthews, pearson, spearman; null: the task's."""

    def __post_init__(self) -> None:
        """Read old names."""
        if self.steps_per_dispatch is not None:
            object.__setattr__(self, "micro_steps_per_dispatch", self.steps_per_dispatch)
            object.__setattr__(self, "steps_per_dispatch", None)


@dataclass(frozen=True)
class EvaluationConfig:
    """How it is judged."""

    batch_size: int = 32
    """Rows in one evaluation pass, over all devices together."""
    max_batches: int | None = None
    """Validate on so many batches at most during training, the first ones or, in classification, a fixed random choice; null: all."""
    max_test_batches: int | None = None
    """Test on so many batches at most, chosen likewise, which the results then say; null: all, as published figures are."""
    before: bool = True
    """Test what the run starts from, too; in a comparison, whose report does not read it, false unless its file says otherwise."""
    pseudo_perplexity: bool = False
    """Also mask every token one at a time (Salazar et al. 2020): one row's cost for each token."""
    pseudo_perplexity_rows: int = 100
    """Test rows that pseudo-perplexity reads."""
    examples: list[str] = field(default_factory=list)
    """Sentences with a [MASK], filled in before and after training (masked-lm)."""


@dataclass(frozen=True)
class ClusterConfig:
    """How several hosts find each other; null: what jax.distributed.initialize() detects (Cloud TPU, Slurm, Open MPI)."""

    coordinator_address: str | None = None
    """host:port of process 0, which all others reach; null: JAX_COORDINATOR_ADDRESS, or detected."""
    num_processes: int | None = None
    """Processes in total, one a host."""
    process_id: int | None = None
    """This process's number, from 0."""
