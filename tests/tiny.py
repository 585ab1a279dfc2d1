"""Models of two layers, 32 wide, with random weights, and what tests do with them over and over."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from safetensors.numpy import save_file
from transformers import BertConfig

from jaxpeft.adapters import Site
from jaxpeft.adapters.build import init_adapters
from jaxpeft.families import family_of
from jaxpeft.models import build
from jaxpeft.models.heads import HEADS
from jaxpeft.pruning import apply_masks, prune
from jaxpeft.quantization import dequantize, is_quantized, quantize
from jaxpeft.runs.adapters import build_method, prepare_adapters
from jaxpeft.targets import default_targets, match_targets
from jaxpeft.tasks import task_for
from jaxpeft.training import loop
from jaxpeft.training.input_pipeline import InputPipeline
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.step import init_state
from jaxpeft.trees import constants_of, join, leaf_paths, nest, without_shared

VOCABULARY, SEQUENCE = 99, 16
_SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
_BERT = {**_SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "bert": {**_BERT, "model_type": "bert", "pad_token_id": 0},
    "roberta": {**_BERT, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "electra": {**_BERT, "model_type": "electra", "embedding_size": 32, "pad_token_id": 0},
    "xlm-roberta": {**_BERT, "model_type": "xlm-roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "roberta-prelayernorm": {**_BERT, "model_type": "roberta-prelayernorm", "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {
        **_SIZES,
        "model_type": "distilbert",
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 48,
        "pad_token_id": 0,
    },
}
"""transformers' config.json of each architecture."""


def write_encoder(directory, config, draw):
    """Write a BERT encoder without a head as torch does, but without torch. `draw(name, shape)` gives a parameter."""
    sizes = {**BertConfig(**config).to_dict()}
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    rows = {
        "word": sizes["vocab_size"],
        "position": sizes["max_position_embeddings"],
        "token_type": sizes["type_vocab_size"],
    }
    shapes = {f"embeddings.{name}_embeddings.weight": (count, hidden) for name, count in rows.items()}
    layers = {"pooler.dense": (hidden, hidden)}
    for i in range(sizes["num_hidden_layers"]):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            layers[f"encoder.layer.{i}.attention.{name}"] = (hidden, hidden)
        layers[f"encoder.layer.{i}.intermediate.dense"] = (inner, hidden)
        layers[f"encoder.layer.{i}.output.dense"] = (hidden, inner)
    norms = [name.replace("dense", "LayerNorm") for name in layers if name.endswith("output.dense")]
    for name, shape in (*layers.items(), *((name, (hidden,)) for name in ("embeddings.LayerNorm", *norms))):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    directory.mkdir(exist_ok=True)
    save_file({name: draw(name, shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    return directory


def random_encoder(directory, *, seed=0, **config):
    """A tiny BERT encoder with every parameter drawn at random: normal, and around 1 for the scales of layer norms."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        scale = name.endswith("LayerNorm.weight")
        return (rng.standard_normal(shape) * 0.2 + scale).astype(np.float32)

    return write_encoder(directory, {**CONFIGS["bert"], **config}, draw)


def loader(directory):
    """`(model_type, task="masked-lm", *, config={}, **options of load_model) → Model`, each built once."""

    @functools.cache
    def load(model_type, task, overrides, options):
        folder = directory / f"{model_type}-{abs(hash(overrides))}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**CONFIGS[model_type], **dict(overrides)}))
        options = dict(options)
        if task == "classification":
            options.setdefault("num_labels", 2)
        with mock.patch.object(build, "_draw", draw):
            return build.load_model(str(folder / "config.json"), task, weights="random", **options)

    def cached(model_type, task="masked-lm", *, config=None, **options):
        return load(model_type, task, tuple(sorted((config or {}).items())), tuple(sorted(options.items())))

    return cached


def draw(model, paths, seed):
    """Stands in for compiling transformers' initialisation, two seconds a model; and here biases are not zero."""
    shapes = leaf_paths(jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 1))))
    ones = {path: 1.0 if path.endswith("/scale") else 0.0 for path in paths}
    return {path: ones[path] + normal(seed + i, *shapes[path].shape, scale=0.2) for i, path in enumerate(paths)}


class Toy:
    """Stands in for a `Model` where the architecture does not matter; its steps compile in a fraction of a second."""

    task, behind_attention, model_type = "masked-lm", None, "toy"
    head = HEADS[task]
    family = family_of(model_type)

    class Module(nn.Module):
        dropout: float = 0.1

        @nn.compact
        def __call__(self, input_ids, deterministic=True):
            x = nn.Embed(VOCABULARY, 16, name="embed")(input_ids)
            x = nn.Dropout(self.dropout)(nn.gelu(nn.Dense(24, name="up")(x)), deterministic=deterministic)
            return SimpleNamespace(logits=nn.Dense(VOCABULARY, name="down")(x))

    def __init__(self, *, quantized=False):
        self.module = self.Module()
        self.params = {
            "embed": {"embedding": jnp.asarray(normal(0, VOCABULARY, 16))},
            "up": {"kernel": jnp.asarray(normal(1, 16, 24, scale=0.3)), "bias": jnp.asarray(normal(2, 24))},
            "down": {"kernel": jnp.asarray(normal(3, 24, VOCABULARY, scale=0.3)), "bias": jnp.zeros(VOCABULARY)},
        }

        if quantized:
            for layer in (self.params["up"], self.params["down"]):
                layer["kernel"] = jax.device_put(quantize(layer["kernel"]))

    def inputs(self, batch):
        return {"input_ids": batch["input_ids"]}

    def sites(self):
        return {"up": Site("up", 16, 24), "down": Site("down", 24, VOCABULARY)}


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def batch(rows=4, *, seed=0, length=SEQUENCE, masked=3, task="masked-lm", num_labels=2):
    """A batch as `jaxpeft.data` makes them; the last tokens of every other row are padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCABULARY, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), np.int32)
    mask[1::2, -4:] = 0
    common = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    if task == "classification":
        labels = rng.integers(0, num_labels, rows).astype(np.int32)
        return {**common, "labels": labels, "weights": np.ones(rows, np.float32)}
    positions = np.stack([np.sort(rng.permutation(length - 4)[:masked]) for _ in range(rows)]).astype(np.int32)
    labels = np.take_along_axis(ids, positions, axis=1)
    return {**common, "positions": positions, "labels": labels, "weights": np.ones(labels.shape, np.float32)}


def adapted(model, method, *, target_modules=None, fully_trained=(), nonzero=True, scale=0.2, seed=1):
    """`(frozen, adapters)` for `model`; with `nonzero`, B is drawn too, as if it had been trained."""
    names = list(target_modules or default_targets("lora", model.model_type) or model.sites())
    targets = match_targets(model.sites(), names)
    frozen, adapters = init_adapters(
        model.params, method, targets, rng=jax.random.key(seed), fully_trained=fully_trained
    )
    if nonzero:
        for i, site in enumerate(adapters["sites"].values()):
            for j, (name, value) in enumerate(site.items()):
                if (value == value.reshape(-1)[0]).all():  # zeros, or IA³'s ones: what makes a fresh adapter silent
                    site[name] = value + jnp.asarray(normal(100 + i + 50 * j, *value.shape, scale=scale))
    return frozen, adapters


def doubled(model, *trees):
    """The model computing in float64, and `trees` with their floats in it. Inside `jax.enable_x64`."""

    def cast(leaf):
        return jnp.asarray(leaf, jnp.float64 if leaf.dtype.kind == "f" else None)

    return replace(model, module=model.module.clone(dtype=jnp.float64)), *(jax.tree.map(cast, tree) for tree in trees)


def half_masks(adapters):
    """Masks that prune half of every tensor of the sites."""
    return prune(adapters["sites"], 0.5)


def merge_pure(frozen, adapters, method, masks=None):
    """`merge` as the methods define it, without its checks on the host, so that it can be differentiated."""
    constants = constants_of(frozen, masks)
    frozen, shared = without_shared(frozen)
    leaves = leaf_paths(join(frozen, adapters["modules"]))
    leaves = {k: dequantize(v) if is_quantized(v) else v for k, v in leaves.items()}
    for path, params in apply_masks(adapters["sites"], masks or {}).items():
        matrix = f"{path}/kernel" if f"{path}/kernel" in leaves else f"{path}/embedding"
        kernel, bias, params = (
            leaves[matrix],
            leaves.get(f"{path}/bias"),
            {**shared, **constants.get(path, {}), **params},
        )
        leaves[matrix] = method.at(path).kernel(kernel.astype(jnp.float32), params).astype(kernel.dtype)
        if bias is not None:
            leaves[f"{path}/bias"] = method.at(path).adapted_bias(bias, params)
    return nest(leaves)


def training(
    model, method, *, learning_rate=1e-2, weight_decay=0.0, max_grad_norm=0.0, accumulation_steps=1, pruned=False, **kw
):
    """`(objective, optimizer, frozen, state)`: what a run is made of, at a constant learning rate."""
    frozen, adapters = adapted(model, method, nonzero=False, **kw)
    optimizer = build_optimizer(
        optax.constant_schedule(learning_rate),
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        accumulation_steps=accumulation_steps,
    )
    objective = Objective(model, method, task_of(model))
    return objective, optimizer, frozen, init_state(adapters, optimizer, jax.random.key(7), pruned=pruned)


def task_of(model):
    """The task that a model was loaded for."""
    return task_for(model.task, model.config.num_labels if model.head.has_classes else None)


def prepared(config, model, **options):
    """The base and fresh adapters of the run that `config` describes, on `model`."""
    method = build_method(config.adapter)
    return prepare_adapters(config.adapter, method, task_for(config.task, 2), model, seed=config.seed, **options)


def fit(state, frozen, plan, *, progress, validate, checkpoints, metrics_log, validate_start=None, **options):
    """`training.loop.fit` of a single run; raises the error that it ended in."""
    run = loop.RunState(plan, progress, state, validate, checkpoints, metrics_log, validate_start)
    (outcome,) = loop.fit(state, frozen, [run], **options)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def fed(step, parallel, *, batch_at=lambda index: batch(seed=index), most=1):
    """`draw_at` and `train_steps` of `fit`: whole batches for draws, up to `most` passes in a dispatch."""
    source = whole_batches(parallel, batch_at=batch_at)
    return {"draw_at": source.draw_at, "train_steps": source.train_steps(step, most)}


def whole_batches(parallel, *, batch_at=lambda index: batch(seed=index)):
    """An input pipeline whose draws are whole batches."""
    return InputPipeline(
        batch_at, lambda device_data, batch: batch, {}, functools.partial(parallel.shard, axis=1), lambda: batch_at(0)
    )


def mean_loss(objective, frozen, adapters, masks, batch, rng=None):
    """The mean loss of a batch, written out. Without the method's penalty."""
    total, weight = objective.loss(objective.logits(frozen, adapters, masks, batch, rng), batch)
    return total / weight


def copied(tree):
    """The tree in arrays of its own: what a step may be donated."""
    return jax.tree.map(jnp.copy, tree)


def snapshot(tree):
    """The tree's values on the host: what donation cannot take away."""
    return jax.tree.map(lambda leaf: np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
