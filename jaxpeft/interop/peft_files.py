"""PEFT's files: `adapter_config.json` and `adapter_model.safetensors`, both ways. Conversion happens here and nowhere else.

What PEFT can carry, and what was chosen:

- A trained layer goes to `modules_to_save`, by its full dotted name.
- The bias of a masked-LM head (`cls.predictions.bias`) is a bare parameter beside a decoder that is tied to the word
  embeddings. `modules_to_save=["cls"]` would write those embeddings again (47 MB for BERT), and PEFT raises a KeyError if the file lacks
  them. So the head's modules are named one by one, and the bias stands in the file under its own name: PEFT loads a key
  that is the base model's own parameter as it is. One limit: PEFT does not write that key when *it* saves the adapter again.
- An adapter that is nothing but modules (the head-only baseline) needs a method all the same: LoRA on PEFT's
  "dummy-target-modules", which adapts no layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpeft.adapters import Hira, Lora, Method
from jaxpeft.errors import InputError, near
from jaxpeft.models.build import Model
from jaxpeft.models.checkpoint import to_torch_layout, torch_name
from jaxpeft.paths import Adapters, Layers, Params, by_layer, by_leaf, leaf_paths, split
from jaxpeft.pruning.masks import apply_masks

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DUMMY_TARGETS = "dummy-target-modules"

# PEFT's key after the layer's name → our parameter; all are stored transposed.
_KEYS = {
    "lora": {"lora_A.weight": "a", "lora_B.weight": "b"},
    "hira": {"hira_A": "a", "hira_B": "b"},
}
# Options that change what an adapter computes and that this version does not: refused where they are set. PEFT has had the
# first six for long, so they are written too.
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}
_UNSUPPORTED = {
    **_PLAIN,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
}
# Initialisations after which PEFT subtracts the adapter's start from the base's weights, again at every load.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class BaseInfo:
    """What an adapter's config says of its base: hub id or directory, torch class, architecture, and PEFT's task type."""

    name: str
    torch_class: str
    model_type: str
    task_type: str | None

    @classmethod
    def of(cls, model: Model, name: str | None = None) -> BaseInfo:
        """What to say of `model`: its hub id where it has one, else its directory; `name` says otherwise."""
        name = name or model.source.hub_id or str(model.source.directory.absolute())
        return cls(name, model.torch_class, model.model_type, "SEQ_CLS" if model.task == "classification" else None)


def save_adapter(
    directory: Path | str,
    adapters: Adapters,
    method: Method | None,
    *,
    base: BaseInfo,
    masks: Layers | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> Path:
    """Write an adapter as PEFT does; pruned entries are zeros. Returns the weights' file.

    Args:
        directory: made where it does not exist.
        adapters: `{"sites": …, "modules": …}`.
        method: what the sites' parameters mean.
        base: what the config says of the base model.
        masks: bool, True = keep.
        target_modules: recorded as they were given; by default the adapted layers' full names.
        exclude_modules: likewise.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _site_tensors(apply_masks(adapters["sites"], masks or {}), method)
    for path, leaf in by_leaf(adapters["modules"]).items():
        tensors[_PREFIX + torch_name(path)] = to_torch_layout(path, np.asarray(leaf))
    names = target_modules or sorted(path.replace("/", ".") for path in adapters["sites"]) or _DUMMY_TARGETS
    config = {
        **_method_config(method),
        "auto_mapping": None if base.task_type else _auto_mapping(base),
        "base_model_name_or_path": base.name,
        "exclude_modules": _jsonable(exclude_modules),
        "inference_mode": True,
        "modules_to_save": modules_to_save(adapters["modules"]) or None,
        "target_modules": _jsonable(names) if adapters["sites"] else _DUMMY_TARGETS,
        "task_type": base.task_type,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return directory / WEIGHTS_FILE


def load_adapter(directory: Path | str, params: Params) -> tuple[Params, Adapters, Method | None]:
    """Read an adapter that PEFT or `save_adapter` wrote, for a model with `params`; return `(frozen, adapters, method)`.

    Raises:
        InputError: for a missing or pickled file, a method or option that is not supported, or tensors that do not fit the model.
    """
    directory = Path(directory)
    config = _read_config(directory)
    method = _method(config, directory)
    leaves = leaf_paths(params)
    known = {
        torch_name(path): path for path in leaves if path.rpartition("/")[2] in ("kernel", "embedding", "scale", "bias")
    }
    sites: Layers = {}
    modules: dict[str, jax.Array] = {}
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in _read_tensors(directory).items()}
    for name, tensor in tensors.items():
        layer, parameter = _site_key(name, config["peft_type"].lower())
        if parameter and f"{layer}/kernel" in leaves:
            sites.setdefault(layer, {})[parameter] = jax.numpy.asarray(tensor.T)
        elif name in known:
            modules[known[name]] = jax.numpy.asarray(_fitting(known[name], tensor, leaves[known[name]], name))
        elif not _is_tied_copy(name, tensor, tensors, leaves):
            raise InputError(_no_place(directory / WEIGHTS_FILE, name, known))
    for layer, group in sites.items():
        _check_site(group, method, leaves[f"{layer}/kernel"].shape, layer, directory)
    frozen, _ = split(params, modules.__contains__)
    return frozen, {"sites": sites, "modules": by_layer(modules)}, method if sites else None


def modules_to_save(modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The dotted names of the trained modules: layer by layer, but `classifier` as a whole; a bare bias has none.

    PEFT wants every tensor of a module that it wraps, so what is above a trained layer must not be named: it may hold
    what did not train. It adds `classifier` itself for sequence classification, and a name below that would be wrapped twice.
    """
    whole = [layer for layer, group in modules.items() if set(group) != {"bias"}]
    return sorted({"classifier" if layer.startswith("classifier/") else layer.replace("/", ".") for layer in whole})


def _site_tensors(sites: Layers, method: Method | None) -> dict[str, np.ndarray]:
    if method is None:
        return {}
    return {
        f"{_PREFIX}{path.replace('/', '.')}.{key}": np.ascontiguousarray(np.asarray(params[parameter]).T)
        for path, params in sites.items()
        for key, parameter in _KEYS[method.name].items()
    }


def _method_config(method: Method | None) -> dict[str, Any]:
    if isinstance(method, Hira):
        return {
            "peft_type": "HIRA",
            "r": method.rank,
            "hira_dropout": method.dropout,
            "init_weights": True,
            "fan_in_fan_out": False,
        }
    lora = method if isinstance(method, Lora) else Lora()
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        **_PLAIN,
    }


def _auto_mapping(base: BaseInfo) -> dict[str, str]:
    name = base.model_type.replace("-", "_")
    return {"base_model_class": base.torch_class, "parent_library": f"transformers.models.{name}.modeling_{name}"}


def _jsonable(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if names is None or isinstance(names, str) else sorted(names)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {CONFIG_FILE} in '{directory}': it is not an adapter's directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or str(config.get("peft_type", "")).lower() not in _KEYS:
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise InputError(f"{file}: peft_type {found!r} is not supported; known: {', '.join(_KEYS).upper()}")
    for option, plain in _UNSUPPORTED.items():
        if config.get(option, plain) not in (plain, None):
            raise InputError(f"{file}: {option}={config[option]!r} is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_INITS):
        raise InputError(
            f"{file}: init_lora_weights={start!r} also changes the base's weights, which is not supported; in torch, "
            "save_pretrained(dir, path_initial_model_for_weight_conversion=…) makes a plain LoRA of it"
        )
    return config


def _method(config: Mapping[str, Any], directory: Path) -> Method:
    # A key that is absent has PEFT's default: LoRA r 8, alpha 8; HiRA r 32.
    if config["peft_type"].lower() == "hira":
        return Hira(rank=config.get("r", 32), dropout=config.get("hira_dropout", 0.0))
    return Lora(rank=config.get("r", 8), alpha=config.get("lora_alpha", 8), dropout=config.get("lora_dropout", 0.0))


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        # Half-precision files too: what trains is fp32.
        return {key: tensor.astype(np.float32) for key, tensor in load_file(directory / WEIGHTS_FILE).items()}
    except FileNotFoundError as error:
        if (directory / "adapter_model.bin").is_file():
            raise InputError(
                f"{directory / 'adapter_model.bin'} is a pickle, which can run code when loaded; "
                "load it in torch PEFT and save_pretrained() it again"
            ) from error
        raise InputError(f"no {WEIGHTS_FILE} in '{directory}'") from error
    except SafetensorError as error:
        raise InputError(f"{directory / WEIGHTS_FILE} cannot be read: {error}") from error


def _site_key(name: str, method: str) -> tuple[str, str | None]:
    """`("bert/…/query", "a")` for a site's key, `(…, None)` for any other."""
    for key, parameter in _KEYS[method].items():
        if name.endswith("." + key):
            return name.removesuffix("." + key).replace(".", "/"), parameter
    return name, None


def _fitting(path: str, tensor: np.ndarray, leaf: Any, name: str) -> np.ndarray:
    fitted = to_torch_layout(path, tensor)
    if fitted.shape != leaf.shape:
        raise InputError(
            f"adapter tensor '{name}' has shape {fitted.shape}, the model's {leaf.shape}: it was trained on another base"
        )
    return fitted


def _is_tied_copy(name: str, tensor: np.ndarray, tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> bool:
    """Whether a tensor without a place here repeats one that has: a decoder's weight the word embeddings, its bias the head's.

    PEFT writes both where `modules_to_save` names a whole masked-LM head (`cls`, `lm_head`).
    """
    head, _, leaf = name.rpartition(".decoder.")
    if leaf == "bias":
        return f"{head}.bias" in tensors and np.array_equal(tensor, tensors[f"{head}.bias"])
    embeddings = (value for path, value in leaves.items() if path.endswith("word_embeddings/embedding"))
    return any(np.array_equal(tensor, np.asarray(value, np.float32)) for value in embeddings)


def _no_place(file: Path, name: str, known: Mapping[str, str]) -> str:
    if name.endswith(("decoder.weight", "vocab_projector.weight")):
        return (
            f"{file}: '{name}' was trained apart from the word embeddings, and the Flax model's decoder is tied to them: "
            "train it with modules_to_save naming the head's layers, not the whole head"
        )
    return f"{file}: '{name}' belongs to no layer of this model{near(name, known)}"


def _check_site(group: Mapping[str, Any], method: Method, shape: tuple[int, int], layer: str, directory: Path) -> None:
    if set(group) != {"a", "b"}:
        raise InputError(
            f"{directory / WEIGHTS_FILE}: layer {layer} has only one of its two matrices; the file is incomplete"
        )
    a, b = group["a"].shape, group["b"].shape
    if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != shape:
        raise InputError(
            f"{directory}: the adapter of {layer} is for another base: it has {a} and {b}, the layer {shape}"
        )
    rank = getattr(method, "rank", a[1])
    if not a[1] == b[0] == rank:
        raise InputError(f"{directory}: the adapter of {layer} has rank {a[1]} and {b[0]}, {CONFIG_FILE} says {rank}")
