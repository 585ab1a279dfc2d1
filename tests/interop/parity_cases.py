"""What is compared with torch PEFT: a method with its options, on an architecture and a task."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """`config` names PEFT's config class; `options` are its arguments, without the task.

    `trains` is False where PEFT's own training is no plain AdamW on the task's loss (AdaLoRA has a test of its own), or where the
    start is not what the file holds.
    """

    model_type: str
    task: str
    config: str
    options: dict = field(default_factory=dict)
    trains: bool = True


QUERY_VALUE = ["query", "value"]
LORA = {"r": 4, "lora_alpha": 12, "target_modules": QUERY_VALUE}
HIRA = {"r": 4, "target_modules": QUERY_VALUE}
VERA = {"r": 8}
LYCORIS = {"r": 4, "alpha": 6, "target_modules": QUERY_VALUE}
EMBEDDINGS = ["word_embeddings", "position_embeddings", "query"]
ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 12, "total_step": 100, "target_modules": QUERY_VALUE}
SHIRA = {"r": 2, "target_modules": QUERY_VALUE}
SUPERTUNING = {"sparsity": 0.8, "target_modules": QUERY_VALUE}
BITFIT = {"target_modules": "dummy-target-modules", "bias": "all"}

CASES = {
    # LoRA and its options
    "lora-list": Case("bert", "classification", "LoraConfig", LORA),
    "lora-regex": Case(
        "distilbert", "classification", "LoraConfig", {**LORA, "target_modules": r".*layer\.0.*(q|v)_lin"}
    ),
    "lora-all-linear": Case(
        "roberta", "masked-lm", "LoraConfig", {**LORA, "target_modules": "all-linear", "exclude_modules": ["key"]}
    ),
    "lora-layers": Case(
        "bert", "masked-lm", "LoraConfig", {**LORA, "layers_to_transform": [0], "layers_pattern": "layer"}
    ),
    "lora-head": Case(
        "bert",
        "masked-lm",
        "LoraConfig",
        {**LORA, "target_modules": ["key"], "modules_to_save": ["predictions.transform"], "lora_dropout": 0.1},
        trains=False,  # dropout
    ),
    "rslora": Case("distilbert", "masked-lm", "LoraConfig", {**LORA, "target_modules": ["q_lin"], "use_rslora": True}),
    "rank-pattern": Case(
        "roberta",
        "classification",
        "LoraConfig",
        {**LORA, "rank_pattern": {"query": 2, r"layer\.1\.attention\.self\.value": 6}, "alpha_pattern": {"value": 3}},
    ),
    "rslora-patterns": Case(
        "bert",
        "classification",
        "LoraConfig",
        {**LORA, "use_rslora": True, "rank_pattern": {"query": 2}, "alpha_pattern": {"0.attention.self.value": 3}},
    ),
    "bias-all": Case("bert", "classification", "LoraConfig", {**LORA, "bias": "all"}),
    "bias-lora-only": Case("roberta", "masked-lm", "LoraConfig", {**LORA, "bias": "lora_only"}),
    "lora-bias": Case(
        "distilbert", "classification", "LoraConfig", {**LORA, "target_modules": ["v_lin"], "lora_bias": True}
    ),
    "embeddings": Case("bert", "masked-lm", "LoraConfig", {**LORA, "target_modules": EMBEDDINGS}),
    "embeddings-dora": Case(
        "roberta", "classification", "LoraConfig", {**LORA, "target_modules": EMBEDDINGS, "use_dora": True}
    ),
    "dora": Case("bert", "classification", "LoraConfig", {**LORA, "use_dora": True}),
    "dora-rslora-patterns": Case(
        "distilbert",
        "masked-lm",
        "LoraConfig",
        {
            **LORA,
            "target_modules": ["q_lin", "lin1"],
            "use_dora": True,
            "use_rslora": True,
            "bias": "lora_only",
            "rank_pattern": {"lin1": 2},
        },
    ),
    "lora-gaussian": Case(
        "distilbert",
        "classification",
        "LoraConfig",
        {**LORA, "target_modules": ["q_lin"], "init_lora_weights": "gaussian"},
    ),
    "lora-random": Case("roberta", "masked-lm", "LoraConfig", {**LORA, "init_lora_weights": False}),
    "lora-orthogonal": Case("bert", "masked-lm", "LoraConfig", {**LORA, "init_lora_weights": "orthogonal"}),
    "lora-pissa": Case("bert", "classification", "LoraConfig", {**LORA, "init_lora_weights": "pissa"}),
    "lora-olora-dora": Case(
        "roberta",
        "classification",
        "LoraConfig",
        {**LORA, "init_lora_weights": "olora", "use_dora": True, "use_rslora": True},
    ),
    "lora-eva": Case(
        "distilbert", "masked-lm", "LoraConfig", {**LORA, "target_modules": ["q_lin"], "init_lora_weights": "eva"}
    ),
    # A tag for every token
    "tags": Case("bert", "token-classification", "LoraConfig", LORA),
    "tags-distilbert": Case(
        "distilbert", "token-classification", "LoraConfig", {**LORA, "target_modules": ["q_lin", "v_lin"]}
    ),
    "tags-dora-roberta": Case(
        "roberta", "token-classification", "LoraConfig", {**LORA, "use_dora": True, "bias": "all"}
    ),
    "tags-hira-distilbert": Case(
        "distilbert", "token-classification", "HiraConfig", {**HIRA, "target_modules": ["q_lin", "lin1"]}
    ),
    # Encoders without a head
    "encoder-lora": Case("bert", "sentence-embeddings", "LoraConfig", {**LORA, "bias": "lora_only"}),
    "encoder-hira": Case("distilbert", "sentence-embeddings", "HiraConfig", {**HIRA, "target_modules": "all-linear"}),
    # HiRA
    "hira": Case("bert", "masked-lm", "HiraConfig", {**HIRA, "target_modules": ["query", "attention.output.dense"]}),
    "hira-patterns": Case(
        "distilbert",
        "classification",
        "HiraConfig",
        {
            **HIRA,
            "target_modules": "all-linear",
            "modules_to_save": ["pre_classifier", "classifier"],
            "rank_pattern": {"q_lin": 2},
        },
    ),
    "hira-dropout": Case(
        "roberta",
        "classification",
        "HiraConfig",
        {**HIRA, "target_modules": ["intermediate.dense"], "hira_dropout": 0.1},
        trains=False,
    ),
    "hira-embeddings": Case(
        "bert", "classification", "HiraConfig", {**HIRA, "target_modules": EMBEDDINGS, "init_weights": "gaussian"}
    ),
    # (IA)³, with PEFT's own target_modules first
    "ia3": Case("bert", "masked-lm", "IA3Config"),
    "ia3-regex": Case(
        "distilbert",
        "classification",
        "IA3Config",
        {"target_modules": r".*\.(k_lin|v_lin|lin2)", "feedforward_modules": r".*\.lin2"},
    ),
    "ia3-outputs": Case(
        "roberta",
        "classification",
        "IA3Config",
        {"target_modules": ["query", "intermediate.dense"], "feedforward_modules": [], "init_ia3_weights": False},
    ),
    # VeRA; a rank above the layers' width, and layers of several widths
    "vera": Case("bert", "classification", "VeraConfig", {**VERA, "target_modules": QUERY_VALUE, "d_initial": 0.2}),
    "vera-widths": Case(
        "distilbert",
        "masked-lm",
        "VeraConfig",
        {**VERA, "r": 40, "target_modules": ["q_lin", "lin1", "lin2"], "projection_prng_key": 7},
    ),
    "vera-unsaved": Case(
        "roberta",
        "classification",
        "VeraConfig",
        {**VERA, "target_modules": QUERY_VALUE, "save_projection": False, "projection_prng_key": 3},
    ),
    "vera-dropout": Case(
        "roberta",
        "masked-lm",
        "VeraConfig",
        {**VERA, "target_modules": ["key"], "vera_dropout": 0.1, "init_weights": False},
        trains=False,
    ),
    # LoHa: at rank 3 by thin factors, at 4 by the full update
    "loha": Case(
        "roberta", "masked-lm", "LoHaConfig", {**LYCORIS, "rank_pattern": {"value": 3}, "alpha_pattern": {"value": 5}}
    ),
    "loha-random": Case(
        "distilbert",
        "classification",
        "LoHaConfig",
        {**LYCORIS, "target_modules": ["q_lin", "lin2"], "init_weights": False},
    ),
    "loha-dropouts": Case(
        "bert", "classification", "LoHaConfig", {**LYCORIS, "rank_dropout": 0.1, "module_dropout": 0.2}, trains=False
    ),
    # LoKr: both factors decomposed, neither, and one
    "lokr": Case(
        "bert",
        "masked-lm",
        "LoKrConfig",
        {**LYCORIS, "r": 2, "decompose_both": True, "target_modules": ["query", "intermediate.dense", "output.dense"]},
    ),
    "lokr-lycoris": Case(
        "distilbert",
        "classification",
        "LoKrConfig",
        {**LYCORIS, "target_modules": ["v_lin", "lin1"], "decompose_factor": 4, "r": 8, "init_weights": "lycoris"},
    ),
    "lokr-patterns": Case(
        "roberta",
        "masked-lm",
        "LoKrConfig",
        {
            **LYCORIS,
            "rank_pattern": {"query": 2},
            "alpha_pattern": {"0.attention.self.value": 3},
            "decompose_factor": 2,
        },
    ),
    "lokr-dropouts": Case(
        "roberta",
        "classification",
        "LoKrConfig",
        {**LYCORIS, "rank_dropout": 0.1, "rank_dropout_scale": True, "module_dropout": 0.2, "init_weights": False},
        trains=False,
    ),
    # AdaLoRA, before an allocation; its training is test_adalora.py's
    "adalora": Case("bert", "classification", "AdaLoraConfig", ADALORA, trains=False),
    "adalora-options": Case(
        "roberta",
        "masked-lm",
        "AdaLoraConfig",
        {
            **ADALORA,
            "lora_alpha": 0,
            "bias": "lora_only",
            "tinit": 5,
            "tfinal": 7,
            "deltaT": 3,
            "beta1": 0.5,
            "beta2": 0.6,
            "orth_reg_weight": 0.1,
            "lora_dropout": 0.1,
        },
        trains=False,
    ),
    "adalora-random": Case(
        "distilbert",
        "classification",
        "AdaLoraConfig",
        {**ADALORA, "target_modules": ["q_lin", "lin1"], "lora_alpha": 1, "init_lora_weights": False},
        trains=False,
    ),
    # Sparse updates: values and indices
    "shira": Case(
        "bert",
        "masked-lm",
        "ShiraConfig",
        {**SHIRA, "target_modules": ["query", "intermediate.dense"], "random_seed": 5},
    ),
    "shira-random": Case("roberta", "classification", "ShiraConfig", {**SHIRA, "init_weights": False}),
    "supertuning": Case(
        "distilbert", "masked-lm", "SupertuningConfig", {**SUPERTUNING, "target_modules": ["q_lin", "lin2"]}
    ),
    "supertuning-smallest": Case("bert", "classification", "SupertuningConfig", {**SUPERTUNING, "select_top": False}),
    "supra": Case("roberta", "masked-lm", "SupertuningConfig", {**SUPERTUNING, "r": 3, "lora_alpha": 5}),
    "supra-random": Case(
        "distilbert",
        "classification",
        "SupertuningConfig",
        {**SUPERTUNING, "target_modules": ["v_lin", "lin1"], "r": 2, "lora_dropout": 0.1, "init_weights": False},
        trains=False,
    ),
    # What the model has, and no more, trains
    "ln-tuning": Case("bert", "classification", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "ln-tuning-regex": Case(
        "roberta",
        "masked-lm",
        "LNTuningConfig",
        {"target_modules": ".*(LayerNorm|layer_norm)", "exclude_modules": ["embeddings.LayerNorm"]},
    ),
    "ln-tuning-distilbert": Case(
        "distilbert", "classification", "LNTuningConfig", {"target_modules": ["sa_layer_norm", "output_layer_norm"]}
    ),
    "bitfit": Case("bert", "classification", "LoraConfig", BITFIT),
    "bitfit-roberta": Case("roberta", "classification", "LoraConfig", BITFIT),
    # Prompt tuning, which PEFT has for its task types alone
    "prompt-tuning": Case("bert", "classification", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prompt-tuning-vocabulary": Case(
        "roberta",
        "classification",
        "PromptTuningConfig",
        {"num_virtual_tokens": 5, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "prompt-tuning-distilbert": Case(
        "distilbert",
        "classification",
        "PromptTuningConfig",
        {"num_virtual_tokens": 2, "token_dim": 32, "num_attention_heads": 2},
    ),
}
