"""A run's configuration: every flag with its unit and default, checked on construction.

A config file holds the same keys as YAML. Nothing heavy is imported here: `--help` must answer at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxpeft.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub id, local directory, package:module/folder, or a config.json (with weights: random)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Load the checkpoint, or draw every weight at random from the bare config."""
    tokenizer: str | None = None
    """Hub id or directory of the tokenizer; null: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in and frozen matrices are stored in; what trains stays float32. bfloat16 pays on GPU and TPU."""
    dropout: float | None = None
    """Rate of every dropout in the base while training, 0 to 1; null: the checkpoint's own. A short run is better off with 0."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Store the encoder's linear layers in 4-bit NormalFloat (QLoRA), 4-bit floats or int8; none: as the checkpoint holds them."""
    quantization_block_size: int = 64
    """Weights that share one scale in 4 bits, a power of two from 64 to 4096; int8 has a scale per output channel."""
    double_quantization: bool = True
    """Store the scales of 4-bit weights in 8 bits too (4.13 bits a weight instead of 4.5)."""
    attention: Literal["auto", "dense", "flash"] = "auto"
    """Scores in memory or in tiles (flash: GPU, TPU; bfloat16; no dropout); auto: flash where it can be had and pays."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class DataConfig:
    """What it learns from."""

    name: str | None = None
    """python-docs (built in), wikitext-2-raw-v1, glue/sst2 and its like, or any dataset on the hub."""
    subset: str | None = None
    """The hub dataset's configuration, where it has several."""
    train_file: str | None = None
    """Local .txt, .csv, .tsv, .jsonl or .parquet file, instead of name."""
    validation_file: str | None = None
    """Local file; null: a tenth of the training rows is held out."""
    test_file: str | None = None
    """Local file; null: the test figures are the validation's."""
    column_names: list[str] | None = None
    """Names of the columns of a .csv or .tsv without a header line."""
    text_column: str | None = None
    """Column with the text; null: the known one."""
    text_pair_column: str | None = None
    """Column with the second text of a pair, for classification."""
    label_column: str | None = None
    """Column with the label, for classification; null: the known one."""
    max_length: int = 128
    """Tokens in a row: the block's length in masked-lm, the limit of truncation in classification."""
    mask_ratio: float = 0.15
    """Share of the real tokens that is masked (masked-lm), exact for every row."""
    bucket_lengths: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256, 512])
    """Tokens: lengths to which classification rows are padded; one program is compiled for each in use."""
    packing: bool = False
    """Train a classifier on rows of max_length tokens with several texts each, as many texts a batch as without; one program."""


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
    """Which adapter entries exist (Sparse LoRA): magnitude pruning, per tensor, exact."""

    sparsity: float = 0.0
    """Share of each adapter tensor that is pruned, 0 (dense) to below 1."""
    schedule: Literal["one-shot", "cubic"] = "one-shot"
    """Prune once at begin, or in growing steps from begin to end (Zhu & Gupta 2017)."""
    begin: float | None = None
    """Share of all updates after which pruning starts; null: 0.1, but not before the warm-up ends."""
    end: float = 0.6
    """Share of all updates at which the cubic schedule reaches the sparsity."""
    every_steps: int = 50
    """Updates between two prunings of the cubic schedule."""


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
    steps_per_dispatch: int = 10
    """Passes run by one call of the compiled program, at most, and no more than take about twenty seconds; a signal waits for two."""
    log_every_steps: int = 10
    """Updates between two log lines; metrics leave the device only then."""
    eval_every_steps: int | None = None
    """Updates between two validations, each with a checkpoint; null: ten times a run."""
    early_stopping_patience: int | None = None
    """Validations without a better metric after which the run stops; null: never."""
    metric: str | None = None
    """Validation metric that decides which adapter is best: loss, accuracy, f1, matthews, pearson, spearman; null: the task's."""


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


@dataclass(frozen=True)
class RunConfig:
    """One fine-tuning run."""

    name: str | None = None
    """The run's name: its files go to output_dir/name; null: made from model, data and method."""
    output_dir: str = "runs"
    """Directory of all runs."""
    task: Literal["masked-lm", "classification"] = "masked-lm"
    """What is trained: masked language modelling, or the classification of sentences and pairs."""
    seed: int = 0
    """Decides every random draw: new weights, order, masks, dropout."""
    resume: bool = False
    """Go on with the run of this name from its last checkpoint."""
    distributed: bool = False
    """Several hosts (a TPU pod): call jax.distributed.initialize(). Every host runs the same command; output_dir is shared."""
    compilation_cache: str | None = "auto"
    """Directory that keeps compiled programs for later runs; auto: JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxpeft/compiled; null: none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything is loaded."""
        _check_ranges(self)
        _check_combinations(self)

    @property
    def run_name(self) -> str:
        """The run's name, made from what it does where none is given."""
        if self.name:
            return self.name
        model = self.model.name.rstrip("/").removesuffix("/config.json").split("/")[-1]
        data = (self.data.name or (self.data.train_file or "data").split("/")[-1].rsplit(".", 1)[0]).replace("/", "-")
        sparse = "sparse-" if self.pruning.sparsity else ""
        quantized = "q" if self.model.quantization != "none" else ""
        return f"{model}-{data}-{sparse}{quantized}{self.adapter.method}"


def _check_ranges(config: RunConfig) -> None:
    t, p, a, d, m, e = config.training, config.pruning, config.adapter, config.data, config.model, config.evaluation
    block, c = m.quantization_block_size, config.cluster
    checks = [
        ("adapter.rank", a.rank, a.rank is None or a.rank >= 1, "at least 1, or null"),
        ("adapter.alpha", a.alpha, a.alpha is None or a.alpha > 0, "above 0, or null"),
        ("adapter.dropout", a.dropout, 0 <= a.dropout < 1, "at least 0 and below 1"),
        ("adapter.calibration_batches", a.calibration_batches, a.calibration_batches >= 1, "at least 1"),
        ("adapter.rank_dropout", a.rank_dropout, 0 <= (a.rank_dropout or 0) < 1, "at least 0 and below 1, or null"),
        ("adapter.module_dropout", a.module_dropout, 0 <= (a.module_dropout or 0) < 1, "at least 0 and below 1, or null"),
        ("adapter.init_r", a.init_r, a.init_r is None or a.init_r >= 1, "at least 1, or null"),
        ("adapter.target_r", a.target_r, a.target_r is None or a.target_r >= 1, "at least 1, or null"),
        ("adapter.beta1", a.beta1, a.beta1 is None or 0 < a.beta1 < 1, "between 0 and 1, or null"),
        ("adapter.beta2", a.beta2, a.beta2 is None or 0 < a.beta2 < 1, "between 0 and 1, or null"),
        ("adapter.num_virtual_tokens", a.num_virtual_tokens, a.num_virtual_tokens is None or a.num_virtual_tokens >= 1,
         "at least 1, or null"),
        ("model.dropout", m.dropout, 0 <= (m.dropout or 0) < 1, "at least 0 and below 1, or null"),
        ("pruning.sparsity", p.sparsity, 0 <= p.sparsity < 1, "at least 0 and below 1"),
        ("pruning.begin", p.begin, p.begin is None or 0 < p.begin < 1, "between 0 and 1"),
        ("pruning.end", p.end, 0 < p.end <= 1, "above 0 and at most 1"),
        ("pruning.every_steps", p.every_steps, p.every_steps >= 1, "at least 1"),
        ("training.num_steps", t.num_steps, t.num_steps is None or t.num_steps >= 1, "at least 1, or null"),
        ("training.num_epochs", t.num_epochs, t.num_epochs > 0, "above 0"),
        ("training.batch_size", t.batch_size, t.batch_size >= 1, "at least 1"),
        ("training.accumulation_steps", t.accumulation_steps, t.accumulation_steps >= 1, "at least 1"),
        ("training.learning_rate", t.learning_rate, t.learning_rate > 0, "above 0"),
        ("training.loraplus_lr_ratio", t.loraplus_lr_ratio, t.loraplus_lr_ratio is None or t.loraplus_lr_ratio >= 1, "at least 1, or null"),
        ("training.loraplus_lr_embedding", t.loraplus_lr_embedding, t.loraplus_lr_embedding > 0, "above 0"),
        ("training.warmup_steps", t.warmup_steps, t.warmup_steps >= 0, "at least 0"),
        ("training.weight_decay", t.weight_decay, t.weight_decay >= 0, "at least 0"),
        ("training.max_grad_norm", t.max_grad_norm, t.max_grad_norm >= 0, "at least 0"),
        ("training.steps_per_dispatch", t.steps_per_dispatch, t.steps_per_dispatch >= 1, "at least 1"),
        ("training.log_every_steps", t.log_every_steps, t.log_every_steps >= 1, "at least 1"),
        ("training.eval_every_steps", t.eval_every_steps, (t.eval_every_steps or 1) >= 1, "at least 1, or null"),
        ("training.early_stopping_patience", t.early_stopping_patience, (t.early_stopping_patience or 1) >= 1, "at least 1, or null"),
        ("data.max_length", d.max_length, d.max_length >= 8, "at least 8"),
        ("data.mask_ratio", d.mask_ratio, 0 < d.mask_ratio < 1, "between 0 and 1"),
        ("data.bucket_lengths", d.bucket_lengths, min(d.bucket_lengths, default=0) >= 1, "lengths of at least 1"),
        ("model.quantization_block_size", block, block in (64, 128, 256, 512, 1024, 2048, 4096), "a power of two, 64 to 4096"),
        ("evaluation.batch_size", e.batch_size, e.batch_size >= 1, "at least 1"),
        ("evaluation.max_batches", e.max_batches, e.max_batches is None or e.max_batches >= 1, "at least 1, or null"),
        ("evaluation.max_test_batches", e.max_test_batches, e.max_test_batches is None or e.max_test_batches >= 1, "at least 1, or null"),
        ("evaluation.pseudo_perplexity_rows", e.pseudo_perplexity_rows, e.pseudo_perplexity_rows >= 1, "at least 1"),
        ("cluster.num_processes", c.num_processes, c.num_processes is None or c.num_processes >= 1, "at least 1, or null"),
        ("cluster.process_id", c.process_id, 0 <= (c.process_id or 0) < (c.num_processes or math.inf),
         "at least 0 and below cluster.num_processes, or null"),
        ("seed", config.seed, 0 <= config.seed < 2**32, "from 0 to 4294967295"),
    ]  # fmt: skip
    for flag, value, fine, wanted in checks:
        if not fine:
            raise InputError(f"{flag} is {value}; it must be {wanted}")


def _check_combinations(config: RunConfig) -> None:
    if "://" in config.output_dir:
        raise InputError(
            f"output_dir '{config.output_dir}' is a URL; give a directory (a bucket can be mounted with gcsfuse)"
        )
    if not config.data.name and not config.data.train_file:
        raise InputError("no data: give data.name (python-docs, wikitext-2-raw-v1, glue/sst2, …) or data.train_file")
    if config.data.name and config.data.train_file:
        raise InputError(
            f"data.name '{config.data.name}' and data.train_file '{config.data.train_file}' exclude each other: set one to null"
        )
    given = [name for name, value in vars(config.cluster).items() if value is not None]
    if given and not config.distributed:
        raise InputError(f"cluster.{given[0]} {getattr(config.cluster, given[0])} needs --distributed")
    if config.adapter.method not in PRUNABLE and config.pruning.sparsity:
        raise InputError(
            f"pruning.sparsity {config.pruning.sparsity} needs an adapter of matrices ({', '.join(PRUNABLE)}), which adapter.method "
            f"'{config.adapter.method}' is not; set it to 0"
        )
    if config.training.loraplus_lr_ratio and config.adapter.method != "lora":
        raise InputError(
            f"training.loraplus_lr_ratio {config.training.loraplus_lr_ratio:g} is LoRA's, and adapter.method is '{config.adapter.method}'; "
            "set it to null"
        )
    if config.data.packing and config.task != "classification":
        raise InputError("data.packing is for classification, and a row of masked-lm is full already; set it to false")
    if config.data.packing and config.adapter.method == "prompt-tuning":
        raise InputError(
            "data.packing cannot be had with prompt-tuning, whose tokens stand in front of a row; set it to false"
        )
    if config.adapter.method == "full" and config.model.quantization != "none":
        raise InputError(
            "adapter.method 'full' trains every weight and cannot train a quantised base: set model.quantization to none"
        )
    allowed = METRICS[config.task]
    if config.training.metric and config.training.metric not in allowed:
        raise InputError(
            f"training.metric '{config.training.metric}' is not measured for {config.task}; choose from {', '.join(allowed)}"
        )


PRUNABLE = ("lora", "hira", "loha", "lokr")
"""Methods whose matrices can be pruned; AdaLoRA allocates its ranks itself."""

METRICS = {
    "masked-lm": ("loss", "perplexity", "accuracy"),
    "classification": ("loss", "accuracy", "f1", "matthews", "pearson", "spearman"),
}
"""Validation metrics by task."""
