"""PEFT's files, `adapter_config.json` and `adapter_model.safetensors`: written and read.

How fully trained parameters are stored:

- A trained layer goes to `modules_to_save`, by its full dotted name.
- The bias of a masked-LM head (`cls.predictions.bias`) is a bare parameter beside a decoder that is tied to the word
  embeddings. `modules_to_save=["cls"]` would write those embeddings again (47 MB for BERT), and PEFT raises a KeyError if the file
  lacks them. So the head's modules are named one by one, and the bias is in the file under its own name: PEFT loads a key that
  is a parameter of the base model. One limit: PEFT does not write that key when *it* saves the adapter again.
- A bias that trains in an adapted layer is PEFT's `base_layer.bias`.
- An adapter without sites (the head-only baseline) needs a method in PEFT: LoRA on "dummy-target-modules", which adapts no layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters import HasConstants, Lora, Method, ModifiesBase, SharesFactors, Site, SiteMethod
from jaxpeft.adapters.build import with_adjusted_base
from jaxpeft.errors import InputError
from jaxpeft.families import family_of, known
from jaxpeft.interop.peft import FORMATS
from jaxpeft.interop.peft.checks import check_site, no_place
from jaxpeft.interop.peft.constants import put_beside, shapes_of, take_apart
from jaxpeft.interop.peft.format import NO_TARGETS, Format
from jaxpeft.interop.peft.generic import PREFIX, GenericFormat
from jaxpeft.interop.peft.weights import CONFIG_FILE, read_tensors, weights_file, write_tensors
from jaxpeft.models.build import Model
from jaxpeft.models.weights import to_torch_layout, torch_name
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.quantization import is_quantized
from jaxpeft.trees import CONSTANTS, SHARED, Adapters, Layers, Params, by_layer, by_leaf, leaf_paths, split


@dataclass(frozen=True)
class BaseInfo:
    """The base in an adapter's config: hub id or directory, torch class, architecture, and PEFT's task type.

    `sizes` are for prompt tuning only: the width of the embedded words, and the numbers of layers and heads.
    """

    name: str
    torch_class: str
    model_type: str
    task_type: str | None
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, name: str | None = None) -> BaseInfo:
        """The info of `model`, named by its hub id if it has one, else by its directory; `name` overrides both."""
        name = name or model.source.hub_id or str(model.source.directory.absolute())
        task_type, c = model.head.peft_task_type, model.config
        width = getattr(c, "embedding_size", c.hidden_size)
        sizes = {"token_dim": width, "num_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads}
        return cls(name, model.torch_class, model.model_type, task_type, sizes)


def save_adapter(
    directory: Path | str,
    adapters: Adapters,
    method: Method | None,
    *,
    base: BaseInfo,
    frozen: Params | None = None,
    start: Adapters | None = None,
    masks: Layers | None = None,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    packed: bool = False,
) -> Path:
    """Write an adapter as PEFT does; pruned entries are zeros. Return the weights' file.

    A method that PEFT does not have is written in jaxpeft's own format (`generic.py`).

    Args:
        directory: created if it does not exist.
        adapters: `{"sites": …, "modules": …}`.
        method: the method of the sites' parameters; None without sites.
        base: the base model, as the config names it.
        frozen: the frozen parameters of the training. Needed if the sites share frozen factors (VeRA) or have constants (the indices
            of a sparse update), and if the initialisation adjusted a quantised base (OLoRA): the file then names the
            initialisation, and every load repeats it.
        start: the initial adapter, if the initialisation adjusted the base (PiSSA, OLoRA, LoRA-GA). The file then holds the
            difference to it: a LoRA of twice the rank for the original base.
        masks: bool, True = keep; of a sparse update its indices, if they were redrawn.
        target_modules: written as given; by default the adapted layers' full names.
        exclude_modules: written as given.
        packed: store a bit mask and the kept values in the place of the zeros (`packed.py`). PEFT cannot read such a file.

    Raises:
        InputError: if the initialisation adjusted the base and `start` is not given, or the format cannot hold the method's options.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sites = apply_masks(adapters["sites"], masks or {})
    if masks and isinstance(method, SiteMethod):
        method, sites = method.without_pruned(sites, masks)
    if isinstance(method, SiteMethod):
        method, sites = method.as_saved(sites)
    shared = (frozen or {}).get(SHARED, {})
    form = _format_of(method, sites, shared)
    if start is not None and _is_quantized_at(frozen or {}, sites):
        # The adjusted base was quantised again, so the difference to the initial adapter would not fit the original base. Every
        # load repeats the adjustment and the rounding instead.
        start = None
    if isinstance(method, HasConstants) and sites:
        method, sites = put_beside(form, method, sites, frozen or {}, masks or {})
    if method is not None:
        method, sites = form.exported(method, sites, None if start is None else start["sites"])
    tensors = {} if method is None else _site_tensors(sites, form)
    saves_shared = isinstance(method, SharesFactors) and method.saves_shared
    if sites and saves_shared and not shared:
        raise InputError(
            f"{form.peft_type} keeps factors that all layers share with the frozen parameters; give them as frozen="
        )
    for key, name in form.shared_keys.items() if shared and saves_shared else ():
        tensors[key] = np.ascontiguousarray(np.asarray(shared[name]).T)
    modules = by_leaf(adapters["modules"])
    own = set() if method is None else method.fully_trained(modules, sites)
    for path, leaf in modules.items():
        tensors[_module_key(path, form, sites, own)] = to_torch_layout(path, np.asarray(leaf))
    names = target_modules or sorted(path.replace("/", ".") for path in sites) or NO_TARGETS
    targets = {
        "target_modules": _jsonable(names) if sites else NO_TARGETS,
        "exclude_modules": _jsonable(exclude_modules),
    }
    # The method's own keys win over the common ones.
    config = {
        "auto_mapping": None if base.task_type else _auto_mapping(base),
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "modules_to_save": modules_to_save(_plain_modules(adapters["modules"], own)) or None,
        "peft_type": form.peft_type,
        "task_type": base.task_type,
        **(targets if form.names_layers else base.sizes),
        **form.to_config(Lora() if method is None else form.for_family(method, family_of(base.model_type))),
    }
    config = form.beside_targets(config, sorted(path.replace("/", ".") for path in sites))
    # Sorted at the top only: of the entries of a pattern, the first that matches wins.
    (directory / CONFIG_FILE).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    return write_tensors(directory, tensors, packed=packed)


def load_adapter(directory: Path | str, params: Params) -> tuple[Params, Adapters, Method | None]:
    """Read an adapter that PEFT or `save_adapter` wrote, packed or not, for a model with `params`; return `(frozen, adapters, method)`.

    If the initialisation adjusted the base and the file was not converted (PiSSA, OLoRA, LoftQ), `frozen` is adjusted in the same
    way. PEFT does so at every load, too.

    Raises:
        InputError: if a file is missing, pickled or damaged, a method or option is not supported, or the tensors do not fit the model.
    """
    directory = Path(directory)
    config, form = _read_config(directory)
    file = weights_file(directory)
    leaves = leaf_paths(params)
    names = {torch_name(path): path for path in leaves if path.rpartition("/")[2] in _LEAVES}
    sites: Layers = {}
    constants: Layers = {}
    modules: dict[str, jax.Array] = {}
    shared: dict[str, jax.Array] = {}
    # Half-precision files are read too; trained parameters are fp32 here. Indices stay whole numbers.
    tensors = {
        key: t if np.issubdtype(t.dtype, np.integer) else t.astype(np.float32) for key, t in read_tensors(file).items()
    }
    form = form.with_tensors(tensors)
    tensors = {_without_prefix(key, form): tensor for key, tensor in tensors.items()}
    for name, tensor in tensors.items():
        layer, parameter = _site_key(name, form, leaves)
        module = _module_name(name, form)
        if name in form.shared_keys:
            shared[form.shared_keys[name]] = jnp.asarray(tensor.T)
        elif parameter:
            sites.setdefault(layer, {})[parameter] = jnp.asarray(tensor.T)
        elif module in names:
            modules[names[module]] = jnp.asarray(_fitting(names[module], tensor, leaves[names[module]], name))
        elif not _is_copy(name, tensor, tensors, leaves):
            raise InputError(no_place(file, name, names))
    frozen, _ = split(params, modules.__contains__)
    method: Method | None = form.settled(form.from_config(config), sites)
    if isinstance(method, SiteMethod):
        targets = {path: _site(path, leaves) for path in sites}
        if isinstance(method, HasConstants):
            sites, constants = take_apart(form, method, sites, targets, leaves)
        for path, group in sites.items():
            whole = {**group, **constants.get(path, {})}
            check_site(whole, shapes_of(method.at(path), targets[path]), form, f"layer {path}", directory)
        if isinstance(method, SharesFactors) and not method.saves_shared and not shared:
            shared = method.init_shared(jax.random.key(0), targets)
        shapes = method.shared_shapes(targets) if isinstance(method, SharesFactors) and targets else {}
        check_site(shared, shapes, form, "the adapter", directory)
        if isinstance(method, ModifiesBase) and method.modifies_base:
            frozen = with_adjusted_base(frozen, method, targets)
        method = method if sites else None
    beside = {key: found for key, found in ((SHARED, shared), (CONSTANTS, constants)) if found}
    frozen = {**frozen, **beside}
    return frozen, {"sites": sites, "modules": by_layer(modules)}, method


_LEAVES = ("kernel", "embedding", "scale", "bias")


def modules_to_save(modules: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The dotted names of the fully trained modules: layer by layer, but `classifier` as a whole. A bare bias is left out.

    PEFT demands every tensor of a module that it wraps. A module above a trained layer may hold frozen layers, so only layers are
    named. For sequence classification PEFT adds `classifier` itself and would wrap a name below it twice.
    """
    whole = [layer for layer, group in modules.items() if set(group) != {"bias"}]
    return sorted({"classifier" if layer.startswith("classifier/") else layer.replace("/", ".") for layer in whole})


def _format_of(method: Method | None, sites: Layers, shared: Mapping[str, Any]) -> Format:
    if method is None:
        return FORMATS["lora"]()
    if method.name in FORMATS and (form := FORMATS[method.name]()).holds(method):
        return form
    return GenericFormat(method.name, sorted({name for group in sites.values() for name in group}), shared)


def _site_tensors(sites: Layers, form: Format) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path, params in sites.items():
        if form.alone_keys:
            keys = {name: key for key, name in form.alone_keys.items()}
        else:
            # Some formats have other keys for embeddings.
            named = form.embedding_keys if _is_embedding(path) and form.embedding_keys else form.keys
            prefix = f"{form.module_prefix}{path.replace('/', '.')}."
            keys = {name: prefix + key for key, name in named.items()}
        tensors |= {keys[name]: np.ascontiguousarray(np.asarray(leaf).T) for name, leaf in params.items()}
    return tensors


def _is_quantized_at(frozen: Params, sites: Layers) -> bool:
    leaves = leaf_paths(frozen)
    return any(is_quantized(leaves.get(f"{path}/kernel")) for path in sites)


def _is_embedding(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.endswith("embeddings") or name in known("word_embeddings").values()


def _module_key(path: str, form: Format, sites: Layers, own: set[str]) -> str:
    """The key of a fully trained leaf."""
    layer, _, leaf = torch_name(path).rpartition(".")
    infix = "base_layer." if path.rpartition("/")[0] in sites else form.module_infix if path in own else ""
    return f"{form.module_prefix}{layer}.{infix}{leaf}"


def _plain_modules(modules: Layers, own: set[str]) -> Layers:
    """The `modules` for PEFT's modules_to_save: all but those that consist of the method's `own` leaves."""
    layers = {path.rpartition("/")[0] for path in by_leaf(modules) if path not in own}
    return {layer: group for layer, group in modules.items() if layer in layers}


def _auto_mapping(base: BaseInfo) -> dict[str, str]:
    name = base.model_type.replace("-", "_")
    return {"base_model_class": base.torch_class, "parent_library": f"transformers.models.{name}.modeling_{name}"}


def _jsonable(names: str | Sequence[str] | None) -> str | list[str] | None:
    return names if names is None or isinstance(names, str) else sorted(names)


def _read_config(directory: Path) -> tuple[dict[str, Any], Format]:
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no {CONFIG_FILE} in '{directory}': it is not an adapter's directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    found = config.get("peft_type") if isinstance(config, dict) else config
    forms = [kind() for kind in FORMATS.values()]
    form = next((form for form in forms if isinstance(found, str) and form.reads(found, config)), None)
    if form is None and isinstance(found, str) and found.startswith(PREFIX):
        form = GenericFormat.named(found)
    if form is None:
        known = ", ".join(dict.fromkeys(form.peft_type for form in forms))
        raise InputError(f"{file}: peft_type {found!r} is not supported; known: {known}")
    form.check(config, str(file))
    return config, form


def _without_prefix(key: str, form: Format) -> str:
    return key if key in form.shared_keys or key in form.alone_keys else key.removeprefix(form.module_prefix)


def _site_key(name: str, form: Format, leaves: Mapping[str, Any]) -> tuple[str, str | None]:
    """`("bert/…/query", "a")` for a site's key, `(…, None)` for any other."""
    if name in form.alone_keys:
        if (layer := _word_embeddings(leaves)) is None:
            raise InputError(
                f"'{name}' belongs to the word embeddings, and jaxpeft does not know which ones are this model's"
            )
        return layer, form.alone_keys[name]
    for keys, leaf in ((form.keys, "kernel"), (form.embedding_keys, "embedding")):
        for key, parameter in keys.items():
            layer = name.removesuffix("." + key).replace(".", "/")
            if name.endswith("." + key) and f"{layer}/{leaf}" in leaves:
                return layer, parameter
    return name, None


def _word_embeddings(leaves: Mapping[str, Any]) -> str | None:
    """Path of the word embeddings, by the names that the families give them: a file is read without the model's config."""
    names = set(known("word_embeddings").values())
    layers = (path.removesuffix("/embedding") for path in leaves if path.endswith("/embedding"))
    return next((layer for layer in layers if layer.rpartition("/")[2] in names), None)


def _module_name(name: str, form: Format) -> str:
    """The torch name of the base's own parameter that `name` stands for."""
    layer, _, leaf = name.rpartition(".")
    infixes = ("base_layer.", form.module_infix)
    return f"{next((layer.removesuffix('.' + i[:-1]) for i in infixes if i and layer.endswith('.' + i[:-1])), layer)}.{leaf}"


def _site(path: str, leaves: Mapping[str, Any]) -> Site:
    is_linear = f"{path}/kernel" in leaves
    d_in, d_out = leaves[f"{path}/{'kernel' if is_linear else 'embedding'}"].shape
    return Site(path, d_in, d_out, "linear" if is_linear else "embedding")


def _fitting(path: str, tensor: np.ndarray, leaf: Any, name: str) -> np.ndarray:
    fitted = to_torch_layout(path, tensor)
    if fitted.shape != leaf.shape:
        raise InputError(
            f"adapter tensor '{name}' has shape {fitted.shape}, the model's {leaf.shape}: it was trained on another base"
        )
    return fitted


def _is_copy(name: str, tensor: np.ndarray, tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> bool:
    """True if a tensor without a place here is a copy of another one.

    If `modules_to_save` names a whole masked-LM head (`cls`, `lm_head`), PEFT writes the decoder's weight and bias too: copies of the
    word embeddings and of the head's bias. With `bias="all"` it writes the biases of a wrapped head twice more: the trained ones
    (`modules_to_save`) and the base's own (`original_module`).
    """
    if ".original_module." in name:
        return True
    plain = re.sub(r"\.modules_to_save(\.default)?", "", name)
    if plain != name:
        return plain in tensors and np.array_equal(tensor, tensors[plain])
    head, _, leaf = name.rpartition(".decoder.")
    if leaf == "bias":
        return f"{head}.bias" in tensors and np.array_equal(tensor, tensors[f"{head}.bias"])
    layer = _word_embeddings(leaves)
    return layer is not None and np.array_equal(tensor, np.asarray(leaves[f"{layer}/embedding"], np.float32))
