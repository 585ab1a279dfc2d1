"""Flags of the adapter and of pruning it: `--adapter.*` and `--pruning.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxpeft.pruning import SCHEDULES, SCORES

# `--help` lists the names of the tables. The test is negated, because jsonargparse executes the block of a plain
# `if TYPE_CHECKING` and would then accept any string.
if not TYPE_CHECKING:
    CriterionName = Literal[*SCORES]
    ScheduleName = Literal[*SCHEDULES]
else:
    CriterionName = str
    ScheduleName = str


@dataclass(frozen=True)
class AdapterConfig:
    """What is learned, and where. Names are PEFT's, but rank (its r), alpha (lora_alpha) and dropout (lora_dropout).

    Null is the method's own default, which is PEFT's. An option that is set and that the method does not have is an error;
    rank, alpha and dropout alone may be set for any.
    """

    # fmt: off
    method: Literal["lora", "hira", "ia3", "vera", "loha", "lokr", "adalora", "ln-tuning", "bitfit", "prompt-tuning",
                    "full", "head"] = "lora"
    # fmt: on
    """What is learned; the baselines: full trains every weight, head only the task's head."""
    rank: int | None = None
    """Rank r of the low-rank matrices."""
    alpha: float | None = None
    """The update is scaled by alpha / rank (LoRA, LoHa, LoKr; AdaLoRA by its own rule); HiRA has no alpha."""
    dropout: float = 0.0
    """Dropout rate on the adapter's input, 0 to 1."""
    target_modules: str | list[str] | None = None
    """Adapted layers: a list of names ([query,value]), one regular expression, or all-linear; null: the model's default."""
    exclude_modules: str | list[str] | None = None
    """Layers left out of target_modules, in the same forms."""
    layers_to_transform: int | list[int] | None = None
    """Numbers of the model's layers to adapt, from 0, where target_modules is a list; null: all."""
    layers_pattern: str | list[str] | None = None
    """Name in front of that number (layer), where it is not the usual one."""
    modules_to_save: list[str] | None = None
    """Further modules that train whole; a new head always does."""
    rank_pattern: dict[str, int] | None = None
    """Layers of another rank: name or regular expression of its end → rank. LoRA, HiRA, LoHa, LoKr."""
    alpha_pattern: dict[str, float] | None = None
    """Layers of another alpha, likewise. LoRA, LoHa, LoKr."""
    use_rslora: bool | None = None
    """LoRA: scale by alpha / √rank."""
    use_dora: bool | None = None
    """LoRA: learn the length of every output's weights apart from their direction (DoRA)."""
    bias: Literal["none", "all", "lora_only"] | None = None
    """LoRA, AdaLoRA: the base's biases that train too: none, all, or those of the adapted layers."""
    lora_bias: bool | None = None
    """LoRA: a bias on B."""
    init_lora_weights: bool | str | None = None
    """LoRA's start: true, false, gaussian, orthogonal, pissa, pissa_niter_4, olora, loftq, eva, lora_ga."""
    loftq_config: dict[str, int] | None = None
    """Of init_lora_weights loftq: loftq_bits, loftq_iter."""
    eva_config: dict[str, Any] | None = None
    """Of init_lora_weights eva: rho, tau, whiten, adjust_scaling_factors."""
    lora_ga_config: dict[str, Any] | None = None
    """Of init_lora_weights lora_ga: direction, scale, stable_gamma."""
    calibration_batches: int = 8
    """Training batches that the starts eva and lora_ga look at."""
    init_weights: bool | str | None = None
    """The start of HiRA, VeRA, LoHa and LoKr: true, false (not silent, for tests), gaussian (HiRA), lycoris (LoKr)."""
    feedforward_modules: str | list[str] | None = None
    """IA³: the adapted layers whose input is scaled, not their output."""
    init_ia3_weights: bool | None = None
    """IA³: start silent."""
    projection_prng_key: int | None = None
    """VeRA: seed of the frozen factors."""
    save_projection: bool | None = None
    """VeRA: write the frozen factors into the adapter's file; they can be drawn again from the seed."""
    d_initial: float | None = None
    """VeRA: first value of the vector d."""
    rank_dropout: float | None = None
    """LoHa, LoKr: rate at which outputs of the update are dropped, 0 to 1."""
    rank_dropout_scale: bool | None = None
    """LoKr: scale up what rank_dropout leaves."""
    module_dropout: float | None = None
    """LoHa, LoKr: rate at which a layer's update is left out, 0 to 1."""
    decompose_both: bool | None = None
    """LoKr: low-rank both factors of the Kronecker product."""
    decompose_factor: int | None = None
    """LoKr: size of the smaller factor; -1: as square as can be."""
    target_r: int | None = None
    """AdaLoRA: mean rank of a layer at the end."""
    init_r: int | None = None
    """AdaLoRA: rank of every layer at the start."""
    tinit: int | None = None
    """AdaLoRA: updates before ranks fall."""
    tfinal: int | None = None
    """AdaLoRA: updates at the end with the final ranks."""
    deltaT: int | None = None
    """AdaLoRA: updates between two allocations."""
    beta1: float | None = None
    """AdaLoRA: smoothing of the sensitivity, between 0 and 1."""
    beta2: float | None = None
    """AdaLoRA: smoothing of the uncertainty, between 0 and 1."""
    orth_reg_weight: float | None = None
    """AdaLoRA: weight of the orthogonality of P and Q in the loss."""
    num_virtual_tokens: int | None = None
    """Prompt tuning: trained tokens in front of every row."""
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] | None = None
    """Prompt tuning: start from noise, or from the embeddings of random tokens, or of a text."""
    prompt_tuning_init_text: str | None = None
    """Prompt tuning: that text."""


@dataclass(frozen=True)
class PruningConfig:
    """Which adapter entries exist (Sparse LoRA): pruning per tensor, with exact counts."""

    sparsity: float = 0.0
    """Share of each adapter matrix that is pruned, from 0 (dense) to below 1."""
    criterion: CriterionName = "magnitude"
    """How entries are scored; those with the lowest scores are pruned. magnitude: by absolute value."""
    schedule: ScheduleName = "one-shot"
    """When to prune. one-shot: once, at begin; cubic: in growing amounts from begin to end (Zhu & Gupta 2017)."""
    begin: float | None = None
    """Share of all steps after which pruning starts; null: 0.1, but not before the warm-up ends."""
    end: float = 0.6
    """Share of all steps at which the cubic schedule reaches the sparsity."""
    every_steps: int = 50
    """Steps between two prunings of the cubic schedule."""

    def __post_init__(self) -> None:
        """Refuse names that are in no table."""
        SCORES.check(self.criterion)
        SCHEDULES.check(self.schedule)
