"""Chooses the adapted layers and the fully trained ones, by PEFT's rules for dotted layer names.

A layer's dotted name is its path with dots (`bert.encoder.layer.0.attention.self.query`). For the models here this is also the
layer's name in torch, so `target_modules` means the same in both.

The differences from PEFT 0.21 are deliberate:

- An option without effect is an error. PEFT ignores it or warns. This holds for an entry of `target_modules`,
  `exclude_modules`, `modules_to_save` or `layers_pattern` that matches nothing, and for an index in `layers_to_transform` that
  no layer has. There is one exception: if `target_modules` is a regular expression, an entry of `exclude_modules` may match
  nothing (see below).
- A fully trained layer is never adapted. PEFT looks for the names in `modules_to_save` between dots when it adapts and at the
  end of a name when it trains. So "all-linear" on a DistilBERT classifier first adapts `pre_classifier`, then tries to train it
  fully because it ends in `classifier`, and raises TypeError.
- A decoder tied to the embeddings cannot be adapted. PEFT also leaves it out of "all-linear", but adapts it if a name or a
  regular expression matches it. Here they match nothing.
- PEFT refuses a regular expression that matches a block, a LayerNorm or a Dropout besides layers, unless `exclude_modules`
  leaves those out. Here only a block is refused: a model's sites do not list the others.
- PEFT shortens a list of 20 names or more to suffixes, so `layers_to_transform` then filters full names too. Here a full name
  is always adapted, as in PEFT's shorter lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from jaxpeft.adapters import METHODS, Site
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.families import family_of

# PEFT's expressions. They find the first number after two names, or after a name of `layers_pattern`.
_ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."
_NAMED_LAYER = r"(?:^|.*?\.){}\.(?P<index>\d+)\."


def default_targets(method_name: str, model_type: str) -> tuple[str, ...]:
    """Return the layers that a method adapts if `target_modules` names none: PEFT's defaults, or ours if PEFT has none.

    Empty for methods that name no layers (ln-tuning, bitfit, prompt-tuning), and for architectures without defaults.

    Raises:
        InputError: for a method that does not exist.
    """
    role = METHODS[method_name].default_role
    return family_of(model_type).default_targets.get(role, ()) if role else ()


def default_feedforward(model_type: str) -> tuple[str, ...]:
    """Return those of (IA)³'s default targets that are scaled at their input; empty for architectures without defaults."""
    return family_of(model_type).default_targets.get("feedforward", ())


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

    For example, `["query"]` with `layers_to_transform=[0]` chooses only the first of `enc.layer.0.query`,
    `enc.layer.1.query` and `enc.layer.0.key`.

    Args:
        sites: all linear layers and embeddings, from `discover_sites`.
        target_modules: a string is a regular expression for the whole dotted name, or "all-linear" for every linear
            layer and no embedding. A name in a list matches a dotted name, or its end after a dot.
        exclude_modules: a regular expression or a list, as above. Layers that it matches are left out first.
        layers_to_transform: keep only layers with these indices, counted from 0. `target_modules` must be a list. A layer
            that the list gives by its full name is kept whatever its index.
        layers_pattern: regular expressions for the name before an index (`layer` in `enc.layer.0.query`). By default the
            index is the first number after two names.
        fully_trained_layers: paths of the fully trained layers; they are never adapted.

    Raises:
        InputError: if an entry or an index matches nothing, if no layer is left, or if two options cannot be combined.
    """
    _check_layer_options(target_modules, layers_to_transform, layers_pattern)
    all_linear = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
    # Beside a regular expression, PEFT needs blocks, LayerNorms and Dropouts excluded, and these are no sites here.
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
    """Return the leaf paths below every module whose dotted name ends in an entry of `modules_to_save`, as in PEFT.

    Raises:
        InputError: if an entry matches no module.
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
    """Refuse keys of `rank_pattern` or `alpha_pattern` that `jaxpeft.trees.pattern_value` would never choose.

    Args:
        patterns: the keys, regular expressions for a dotted name or for its end after a dot.
        targets: paths of the adapted layers, from `match_targets`.
        option_name: the option that has the keys, for the message.

    Raises:
        InputError: if a key matches no adapted layer, or is not a regular expression.
    """
    names = [_dotted(path) for path in targets]
    for pattern in patterns:
        # The rule of `pattern_value`, which does not raise InputError. A test checks that the two agree.
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
                "list names, such as [query, value], or write the index into a regular expression"
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
    """Refuse a regular expression that also matches a block of layers: PEFT does, so it could not load the adapter."""
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
    """Keep those of the `named` layers that have an index in `indices`, and those named in full."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    expressions = [_compiled(_NAMED_LAYER.format(p), p, "layers_pattern") for p in patterns] or [re.compile(_ANY_LAYER)]
    for pattern, expression in zip(patterns, expressions, strict=False):
        if not any(expression.match(_dotted(path)) for path in named):
            parents = {a for path in named for a, b in pairwise(path.split("/")) if b.isdigit()}
            raise InputError(
                f"layers_pattern '{pattern}' matches none of the layers that target_modules names"
                f"{did_you_mean(pattern, parents)}; their indices follow {_list(parents) or 'no name'}"
            )
    index_of = {path: _layer_index(path, expressions) for path in named}
    for index in indices:
        if index not in index_of.values():
            after = f" after layers_pattern {layers_pattern!r}" if layers_pattern else ""
            known = ", ".join(str(i) for i in sorted({i for i in index_of.values() if i is not None}))
            raise InputError(
                f"layers_to_transform {index} matches none of the layers that target_modules names; "
                + (f"their indices are {known}" if known else f"none of them has an index{after}: leave it out")
            )
    # PEFT checks the index only if the end of the layer's name matched.
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
    # The first match decides, as in PEFT, even if it has no index. An "a|b" without brackets in a pattern can match so.
    index = next((match["index"] for match in found if match), None)
    return None if index is None else int(index)


def _entries(pattern: str | Sequence[str]) -> list[str | list[str]]:
    """Split a pattern into the parts that must each match something: a regular expression, or the names of a list."""
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
            f"target_modules '{text}' matches no layer that is left: exclude_modules excludes, or modules_to_save "
            "trains, every layer of that name; remove it from one of them"
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
