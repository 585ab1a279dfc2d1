"""Flags of the adapter and of pruning it: `--adapter.*` and `--pruning.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxpeft.adapters import METHODS
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.pruning import SCHEDULES, SCORES

_BASELINES = ("full", "head")

# `--help` lists the names of the tables. The test is negated, because jsonargparse executes the block of a plain
# `if TYPE_CHECKING` and would then accept any string.
if not TYPE_CHECKING:
    MethodName = Literal[(*METHODS, *_BASELINES)]
    CriterionName = Literal[*SCORES]
    ScheduleName = Literal[*SCHEDULES]
else:
    MethodName = str
    CriterionName = str
    ScheduleName = str


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter and its layers. Names are PEFT's, except rank (PEFT's r), alpha (lora_alpha) and dropout (lora_dropout).

    Null means the method's own default, which is PEFT's. Setting an option the method lacks is an error, except rank, alpha
    and dropout, which are then ignored.
    """

    method: MethodName = "lora"
    """The adapter method, or a baseline: full trains every weight, head only the task's head."""
    rank: int | None = None
    """Rank r of the low-rank matrices."""
    alpha: float | None = None
    """The update is scaled by alpha / rank (LoRA, LoHa, LoKr). AdaLoRA has a rule of its own, HiRA no alpha."""
    dropout: float = 0.0
    """Dropout rate on the adapter's input, from 0 to below 1."""
    target_modules: str | list[str] | None = None
    """Adapted layers: a list of names ([query,value]), one regular expression, or all-linear; null: the model's default."""
    exclude_modules: str | list[str] | None = None
    """Layers left out of target_modules, in the same forms."""
    layers_to_transform: int | list[int] | None = None
    """Numbers of the model's layers to adapt, from 0, if target_modules is a list; null: all."""
    layers_pattern: str | list[str] | None = None
    """Name before that number (layer), if it is not the usual one."""
    modules_to_save: list[str] | None = None
    """Further fully trained modules; a new head always trains."""
    rank_pattern: dict[str, int] | None = None
    """Layers of another rank: the end of a layer's name, or a regular expression for it → rank. LoRA, HiRA, LoHa, LoKr."""
    alpha_pattern: dict[str, float] | None = None
    """Layers of another alpha, in the same form. LoRA, LoHa, LoKr."""
    use_rslora: bool | None = None
    """LoRA: scale by alpha / √rank."""
    use_dora: bool | None = None
    """LoRA: learn the length and the direction of every output's weights separately (DoRA)."""
    bias: Literal["none", "all", "lora_only"] | None = None
    """LoRA, AdaLoRA: the base's biases that train too: none, all, or those of the adapted layers."""
    lora_bias: bool | None = None
    """LoRA: a bias on B."""
    keep_base_zeros: bool | None = None
    """LoRA: no update for weights of the base that are zero, so that merging keeps the zeros of a pruned base. Not in PEFT."""
    init_lora_weights: bool | str | None = None
    """LoRA's initialisation: true, false, gaussian, orthogonal, pissa, pissa_niter_4, olora, loftq, eva, lora_ga."""
    loftq_config: dict[str, int] | None = None
    """Options of init_lora_weights loftq: loftq_bits, loftq_iter."""
    eva_config: dict[str, Any] | None = None
    """Options of init_lora_weights eva: rho, tau, whiten, adjust_scaling_factors."""
    lora_ga_config: dict[str, Any] | None = None
    """Options of init_lora_weights lora_ga: direction, scale, stable_gamma."""
    calibration_batches: int = 8
    """Training batches for initialisations and choices from data: eva, lora_ga, gradient, activation."""
    init_weights: bool | str | None = None
    """Initialisation of methods other than LoRA: true, false (changes the output; for tests), gaussian (HiRA), lycoris (LoKr)."""
    mask_type: Literal["random", "magnitude", "smallest", "gradient", "block"] | None = None
    """SHiRA: the entries that train: random ones, those with the largest or smallest weights or the largest gradients, or blocks."""
    block_size: int | None = None
    """SHiRA: side of a block of mask_type block, in entries."""
    random_seed: int | None = None
    """SHiRA, S²FT: seed of the random entries or rows; null: the run's seed."""
    sparsity: float | None = None
    """Super-Tuning: share of each layer's weights that does not train, from 0 to below 1."""
    select_top: bool | None = None
    """Super-Tuning, S²FT: train those with the largest score; false: with the smallest."""
    save_precomputed_indices: bool | None = None
    """Super-Tuning: write the indices into the adapter's file. Without them every load finds them in the base's weights."""
    channels: int | None = None
    """S²FT: feed-forward channels that train in each adapted layer."""
    heads: int | None = None
    """S²FT: attention heads that train in each adapted output projection of attention."""
    selection: Literal["random", "weight", "activation", "gradient"] | None = None
    """S²FT: how heads and channels are chosen: at random, by their weights, their activations or their gradients."""
    attention_modules: list[str] | None = None
    """S²FT: the adapted layers whose inputs are heads, as ends of names; null: those of the model's family."""
    feedforward_modules: str | list[str] | None = None
    """IA³: the adapted layers that are scaled at their input; the others are scaled at their output."""
    init_ia3_weights: bool | None = None
    """IA³: initialise to a no-op; false for tests."""
    projection_prng_key: int | None = None
    """VeRA: seed of the frozen factors."""
    save_projection: bool | None = None
    """VeRA: write the frozen factors into the adapter's file. Without them they are drawn again from the seed."""
    d_initial: float | None = None
    """VeRA: initial value of the vector d."""
    rank_dropout: float | None = None
    """LoHa, LoKr: rate at which outputs of the update are dropped, from 0 to below 1."""
    rank_dropout_scale: bool | None = None
    """LoKr: scale up the outputs that rank_dropout keeps."""
    module_dropout: float | None = None
    """LoHa, LoKr: rate at which the update of a whole layer is dropped, from 0 to below 1."""
    decompose_both: bool | None = None
    """LoKr: give both factors of the Kronecker product a low rank."""
    decompose_factor: int | None = None
    """LoKr: size of the smaller factor; -1: as square as possible."""
    sparse_lambda: float | None = None
    """SoRA: by how much every step moves a gate towards zero; a rank whose gate is zero is left out."""
    target_r: int | None = None
    """AdaLoRA: final rank of a layer, on average."""
    init_r: int | None = None
    """AdaLoRA: initial rank of every layer."""
    tinit: int | None = None
    """AdaLoRA: steps before the ranks fall."""
    tfinal: int | None = None
    """AdaLoRA: last steps, with the final ranks."""
    deltaT: int | None = None
    """AdaLoRA: steps between two allocations."""
    beta1: float | None = None
    """AdaLoRA: decay of the running mean of the sensitivity, between 0 and 1."""
    beta2: float | None = None
    """AdaLoRA: decay of the running mean of the uncertainty, between 0 and 1."""
    orth_reg_weight: float | None = None
    """AdaLoRA: weight of the penalty that keeps P and Q orthogonal."""
    num_virtual_tokens: int | None = None
    """Prompt tuning: trained tokens before every row."""
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] | None = None
    """Prompt tuning: initialise from noise, from the embeddings of random tokens, or from those of a text."""
    prompt_tuning_init_text: str | None = None
    """Prompt tuning: the text for TEXT."""
    options: dict[str, Any] | None = None
    """Options of the method that have no flag of their own, by name: {gamma: 2}."""

    def __post_init__(self) -> None:
        """Refuse an unknown method."""
        known = (*METHODS, *_BASELINES)
        if self.method not in known:
            hint = did_you_mean(self.method, known) or f"; choose from {', '.join(known)}"
            raise InputError(f"there is no adapter.method '{self.method}'{hint}")


@dataclass(frozen=True)
class PruningConfig:
    """Which adapter entries are kept (Sparse LoRA), with exact counts."""

    sparsity: float = 0.0
    """Share of the adapter's entries that is pruned, from 0 (dense) to below 1."""
    criterion: CriterionName = "magnitude"
    """How entries are scored; those with the lowest scores are pruned. magnitude: |w|; product: by how much the update changes;
    snip: |w × gradient| of the last step; movement: −Σ w × gradient over all steps; random."""
    scope: Literal["tensor", "layer", "global"] = "tensor"
    """Among which entries the lowest are pruned: those of each matrix, of each layer, or all. |w| can only be compared within a matrix."""
    structure: str = "element"
    """The pieces that are pruned: element; n:m such as 2:4 (n of every m entries along the axis that is summed over); rank (columns
    of A with rows of B); or a block of rows x columns such as 8x8."""
    schedule: ScheduleName = "one-shot"
    """When to prune. at-start: before the first step; one-shot: once, at begin; cubic: in growing amounts from begin to end
    (Zhu & Gupta 2017); iterative: in rounds, each with a return to early weights; rigl, set: sparse from the start, and rewired
    until end; straight-through: as cubic, but pruned entries train on and may come back until end. For SHiRA and Super-Tuning, which
    are not pruned: rigl and set redraw the entries that train until end, at sparsity 0."""
    begin: float | None = None
    """Share of all steps after which pruning starts; null: 0.1, but not before the warm-up ends."""
    end: float = 0.6
    """Share of all steps at which the masks are final. Not for at-start and one-shot."""
    every_steps: int = 50
    """Steps between two changes of the masks or entries (cubic, straight-through, rigl, set)."""
    rounds: int = 3
    """iterative: the number of prunings."""
    rewind: float = 0.05
    """iterative: share of all steps to whose weights the adapter returns after each pruning; 0: the initial weights."""
    drop_fraction: float = 0.3
    """rigl, set: share of the kept entries that is exchanged at first; it falls to 0 at end along a cosine."""

    def __post_init__(self) -> None:
        """Refuse names that are in no table."""
        SCORES.check(self.criterion)
        SCHEDULES.check(self.schedule)


def redraws_entries(adapter: AdapterConfig, pruning: PruningConfig) -> bool:
    """True if the run redraws the entries of a sparse update while it trains: RigL or SET over SHiRA's or Super-Tuning's.

    The number of these entries is an option of the method, so the sparsity is 0.
    """
    # Both names are looked up only if the schedule was chosen, because a method's file loads jax.
    if pruning.sparsity or pruning.schedule == PruningConfig.schedule or adapter.method not in METHODS:
        return False
    return bool(METHODS[adapter.method].redrawn and SCHEDULES[pruning.schedule].redraws)
