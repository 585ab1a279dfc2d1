"""Which layers are adapted, and which train whole: PEFT's matching rules on dotted layer names.

A layer's dotted name is its path with dots (`bert.encoder.layer.0.attention.self.query`), which for the models here is
its name in torch too, so that a `target_modules` means the same on both sides.

Where this differs from PEFT 0.21, on purpose:

- What has no effect is refused, where PEFT stays silent or warns: an entry of `target_modules`, `exclude_modules`,
  `modules_to_save` or `layers_pattern` that matches nothing, an index in `layers_to_transform` that no layer has.
  Only beside a regular expression may an entry of `exclude_modules` match nothing: see below.
- A layer that trains whole is never adapted. PEFT looks for the names in `modules_to_save` between dots when it adapts
  and at the end of a name when it trains whole, so that "all-linear" on a DistilBERT classifier adapts
  `pre_classifier`, then means to train it whole because of `classifier`, and raises TypeError.
- A decoder tied to the embeddings is no site: "all-linear" leaves it out in PEFT too, but a name or a regular
  expression for it, which PEFT takes, finds nothing.
- PEFT raises on a regular expression that matches a block, a LayerNorm or a Dropout as well as layers, where
  `exclude_modules` does not leave it out. Here a block is refused too; of the others a model's sites know nothing.
- PEFT shortens a list of 20 names or more to suffixes, and so `layers_to_transform` holds for its full names too, from
  20 on. Here a full name is always taken, as in PEFT's shorter lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from jaxpeft.adapters.base import Site
from jaxpeft.errors import InputError, did_you_mean

_BERTS = ("bert", "roberta", "xlm-roberta", "roberta-prelayernorm", "electra", "albert", "big_bird", "roformer")

DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_BERTS, ("query", "value")),
    "distilbert": ("q_lin", "v_lin"),
}
"""Model type → layers adapted by LoRA and its kin where none are named.

PEFT has bert, roberta, xlm-roberta and electra; DistilBERT and the other BERTs that Flax has are ours, by analogy.
"""

# PEFT has bert and roberta. Where attention's output and the feed-forward's are not both `output.dense`, only the
# latter is named: what (IA)³ scales in its paper.
_IA3_FEEDFORWARD = {
    **dict.fromkeys(_BERTS, ("output.dense",)),
    "albert": ("ffn_output",),
    "distilbert": ("lin2",),
}
_IA3 = {
    **{name: ("key", "value", *_IA3_FEEDFORWARD[name]) for name in _BERTS},
    "distilbert": ("k_lin", "v_lin", *_IA3_FEEDFORWARD["distilbert"]),
}

# PEFT has bert as LoRA, and roberta so.
_ADALORA = {**DEFAULT_TARGETS, "roberta": ("query", "key", "value", "dense")}

_DEFAULTS: dict[str, Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("lora", "hira", "vera", "loha", "lokr"), DEFAULT_TARGETS),
    "adalora": _ADALORA,
    "ia3": _IA3,
    "ln-tuning": {},  # every norm, which it finds itself
    "bitfit": {},
    "prompt-tuning": {},
}

CLASSIFIER_HEADS = ("classifier", "score")
"""What PEFT trains whole in sequence classification, by suffix: so DistilBERT's `pre_classifier` too."""

# PEFT's, which looks for the first number behind two names, or behind one of `layers_pattern`.
_ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."
_NAMED_LAYER = r"(?:^|.*?\.){}\.(?P<index>\d+)\."


def default_targets(method_name: str, model_type: str) -> tuple[str, ...]:
    """Return what a method adapts where no `target_modules` are named: PEFT's defaults, and ours where it has none.

    Empty for methods that name no layers (ln-tuning, bitfit, prompt-tuning), and where there is no default for `model_type`.

    Raises:
        InputError: for a method that does not exist.
    """
    if method_name not in _DEFAULTS:
        raise InputError(
            f"there is no method '{method_name}'{did_you_mean(method_name, _DEFAULTS)}; there are {_list(_DEFAULTS)}"
        )
    return _DEFAULTS[method_name].get(model_type, ())


def default_feedforward(model_type: str) -> tuple[str, ...]:
    """Return which of (IA)³'s default targets are scaled at their input; empty where there is no default."""
    return _IA3_FEEDFORWARD.get(model_type, ())


def match_targets(
    sites: Mapping[str, Site],
    target_modules: str | Sequence[str],
    *,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    fully_trained_layers: Iterable[str] = (),
) -> dict[str, Site]:
    """Return the sites that `target_modules` names, by layer path.

    With `["query"]` and `layers_to_transform=[0]`, of `enc.layer.0.query`, `enc.layer.1.query` and `enc.layer.0.key`
    only the first is chosen.

    Args:
        sites: all linear layers and embeddings, from `discover_sites`.
        target_modules: a string is a regular expression for the whole dotted name, or "all-linear", which means every
            linear layer and no embedding; a list matches a name exactly or its end after a dot.
        exclude_modules: a regular expression or a list, as above; what it matches is left out first.
        layers_to_transform: keep only layers with these indices, counted from 0; only with a list. A layer that the
            list gives by its full name is kept whatever its index.
        layers_pattern: the names, as regular expressions, that an index stands behind (`layer` in `enc.layer.0.query`);
            by default the first number behind two names is the index.
        fully_trained_layers: paths of layers that train whole; they are never adapted.

    Raises:
        InputError: where an entry or an index matches nothing, where nothing is left, and for options that cannot go
            together.
    """
    _check_layer_options(target_modules, layers_to_transform, layers_pattern)
    all_linear = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    # For PEFT a regular expression may need modules left out that are no sites: blocks, LayerNorms, Dropouts.
    if exclude_modules and (all_linear or not isinstance(target_modules, str)):
        _check_excluded(exclude_modules, sites)
    whole = set(fully_trained_layers)
    free = {
        path: site
        for path, site in sites.items()
        if path not in whole and not (exclude_modules and _matches(path, exclude_modules))
    }
    if all_linear:
        chosen = {path: site for path, site in free.items() if site.kind == "linear"}
    else:
        chosen = {path: site for path, site in free.items() if _matches(path, target_modules)}
        for entry in _entries(target_modules):
            if not any(_matches(path, entry) for path in chosen):
                raise InputError(_no_match(entry, free, sites))
        if isinstance(target_modules, str):
            _check_blocks(target_modules, free, exclude_modules)
    if indices := _indices(layers_to_transform):
        chosen = _in_layers(chosen, target_modules, indices, layers_pattern or ())
    if not chosen:
        raise InputError(
            f"target_modules {target_modules!r} leaves no layer to adapt; name some in it, "
            "or take names out of exclude_modules and modules_to_save"
        )
    return chosen


def match_modules(leaves: Iterable[str], modules_to_save: Sequence[str]) -> set[str]:
    """Return the leaf paths below the modules whose dotted name ends in an entry of `modules_to_save`, as PEFT matches them.

    Raises:
        InputError: where an entry matches no module.
    """
    leaves = list(leaves)
    modules = {"/".join(parts[:i]) for parts in (leaf.split("/") for leaf in leaves) for i in range(1, len(parts))}
    chosen: set[str] = set()
    for entry in modules_to_save:
        matched = {module for module in modules if _dotted(module).endswith(entry)}
        if not matched:
            names = {_last(module) for module in modules}
            raise InputError(
                f"modules_to_save '{entry}' matches no module{did_you_mean(entry, names)}; there are {_list(names)}"
            )
        chosen |= {leaf for leaf in leaves if any(leaf.startswith(module + "/") for module in matched)}
    return chosen


def check_patterns(patterns: Iterable[str], targets: Iterable[str], option_name: str) -> None:
    """Refuse a key of `rank_pattern` or `alpha_pattern` that `jaxpeft.trees.pattern_value` would never choose.

    Args:
        patterns: the keys: regular expressions for a dotted name, or for its end after a dot.
        targets: paths of the adapted layers, from `match_targets`.
        option_name: the option the keys come from, for the message.

    Raises:
        InputError: where a key matches no adapted layer, or is not a regular expression.
    """
    names = [_dotted(path) for path in targets]
    for pattern in patterns:
        # The rule of `pattern_value`, which may not know of InputError; a test holds the two together.
        expression = _compiled(rf"(.*\.)?({pattern})$", pattern, option_name)
        if not any(expression.match(name) for name in names):
            ends = {_last(path) for path in targets}
            raise InputError(
                f"{option_name} '{pattern}' matches no adapted layer{did_you_mean(pattern, ends)}; the adapted layers end in {_list(ends)}"
            )


def _check_layer_options(
    target_modules: str | Sequence[str],
    layers_to_transform: int | Sequence[int] | None,
    layers_pattern: str | Sequence[str] | None,
) -> None:
    given = {"layers_to_transform": layers_to_transform, "layers_pattern": layers_pattern}
    for option, value in given.items():
        if isinstance(target_modules, str) and value is not None:
            raise InputError(
                f"{option} {value!r} needs a list of target_modules, and '{target_modules}' is a string; "
                "list names, such as [query, value], or say the index in a regular expression"
            )
    if layers_pattern and not _indices(layers_to_transform):
        raise InputError(
            f"layers_pattern {layers_pattern!r} has no effect without layers_to_transform; name indices, such as [0, 1]"
        )


def _check_excluded(exclude_modules: str | Sequence[str], sites: Mapping[str, Site]) -> None:
    for entry in _entries(exclude_modules):
        if not any(_matches(path, entry, "exclude_modules") for path in sites):
            names, text = {_last(path) for path in sites}, entry if isinstance(entry, str) else entry[0]
            raise InputError(
                f"exclude_modules '{text}' matches no layer that could be adapted{did_you_mean(text, names)}; leave it out, "
                f"or name {'whole names' if isinstance(exclude_modules, str) else 'layers, not blocks'}"
            )


def _check_blocks(expression: str, free: Mapping[str, Site], exclude_modules: str | Sequence[str] | None) -> None:
    """Refuse a regular expression that matches a block of layers too, as PEFT does, which then could not load the adapter."""
    for path in free:
        parts = path.split("/")
        for block in ("/".join(parts[:i]) for i in range(1, len(parts))):
            if _matches(block, expression) and not (exclude_modules and _matches(block, exclude_modules)):
                raise InputError(
                    f"target_modules '{expression}' matches the block {_dotted(block)} besides layers, which PEFT "
                    rf"refuses; end it with names of layers, such as '.*\.{re.escape(_last(path))}'"
                )


def _in_layers(
    named: Mapping[str, Site],
    target_modules: str | Sequence[str],
    indices: Sequence[int],
    layers_pattern: str | Sequence[str],
) -> dict[str, Site]:
    """Keep of the layers that `target_modules` names those with an index in `indices`."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    expressions = [_compiled(_NAMED_LAYER.format(p), p, "layers_pattern") for p in patterns] or [re.compile(_ANY_LAYER)]
    for pattern, expression in zip(patterns, expressions, strict=False):
        if not any(expression.match(_dotted(path)) for path in named):
            parents = {a for path in named for a, b in pairwise(path.split("/")) if b.isdigit()}
            raise InputError(
                f"layers_pattern '{pattern}' matches none of the layers that target_modules names"
                f"{did_you_mean(pattern, parents)}; their indices stand behind {_list(parents) or 'no name'}"
            )
    index_of = {path: _layer_index(path, expressions) for path in named}
    for index in indices:
        if index not in index_of.values():
            behind = f" behind layers_pattern {layers_pattern!r}" if layers_pattern else ""
            known = ", ".join(str(i) for i in sorted({i for i in index_of.values() if i is not None}))
            raise InputError(
                f"layers_to_transform {index} matches none of the layers that target_modules names; "
                + (f"their indices are {known}" if known else f"none of them has an index{behind}: leave it out")
            )
    # PEFT asks for the index only of a layer that was matched by the end of its name.
    chosen = {
        path: site for path, site in named.items() if index_of[path] in indices or _dotted(path) in target_modules
    }
    for entry in target_modules:
        if not any(_matches(path, [entry]) for path in chosen):
            example = next(_dotted(path) for path in named if _matches(path, [entry]))
            raise InputError(
                f"target_modules '{entry}' matches no layer with an index of layers_to_transform; leave it out, "
                f"or give a full name, which is adapted whatever its index: {example}"
            )
    return chosen


def _indices(layers_to_transform: int | Sequence[int] | None) -> Sequence[int]:
    return [layers_to_transform] if isinstance(layers_to_transform, int) else layers_to_transform or ()


def _layer_index(path: str, expressions: Iterable[re.Pattern[str]]) -> int | None:
    found = (expression.match(_dotted(path)) for expression in expressions)
    # The first match decides, even one without an index: as an unbracketed "a|b" in a pattern can give, in PEFT too.
    index = next((match["index"] for match in found if match), None)
    return None if index is None else int(index)


def _entries(pattern: str | Sequence[str]) -> list[str | list[str]]:
    """The parts of a pattern that must each match something: a regular expression is one, a list has one for each name."""
    return [pattern] if isinstance(pattern, str) else [[name] for name in pattern]


def _matches(path: str, pattern: str | Sequence[str], option_name: str = "target_modules") -> bool:
    name = _dotted(path)
    if isinstance(pattern, str):
        return _compiled(pattern, pattern, option_name).fullmatch(name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def _compiled(expression: str, pattern: str, option_name: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise InputError(f"{option_name} '{pattern}' is not a regular expression: {error}") from error


def _no_match(entry: str | list[str], free: Mapping[str, Site], sites: Mapping[str, Site]) -> str:
    text = entry if isinstance(entry, str) else entry[0]
    if any(_matches(path, entry) for path in sites):
        return (
            f"target_modules '{text}' matches no layer that is left: exclude_modules leaves out, or modules_to_save "
            "trains whole, all that it names; take it out of one of them"
        )
    if isinstance(entry, str):
        by_name = re.fullmatch(r"[\w., ]+", text)
        hint = f"for layers by name write a list, [{text}]" if by_name else "it must match whole names"
        example = _dotted(next(iter(free), ""))
        return f"target_modules '{text}', read as a regular expression, matches no layer: {hint} (a name: {example})"
    if text.lower() == "all-linear":
        return f"target_modules ['{text}'] matches no layer; write it as a string, not as a list"
    ends: dict[str, set[str]] = {}
    for path, site in free.items():
        ends.setdefault(site.kind, set()).add(_last(path))
    known = f"this model's linear layers end in {_list(ends.get('linear', ()))}"
    if "embedding" in ends:
        known += f"; its embeddings are {_list(ends['embedding'])}"
    return f"target_modules '{text}' matches no layer{did_you_mean(text, set().union(*ends.values()))}; {known}"


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in names if not name.isdigit()))
