"""Which layers are adapted, and which train whole: PEFT's matching rules on dotted layer names.

A layer's dotted name is its path with dots (`bert.encoder.layer.0.attention.self.query`), which for the models here is
its name in torch too, so that a `target_modules` means the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from jaxpeft.adapters.contract import Site
from jaxpeft.errors import InputError, near

DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "roberta-prelayernorm": ("query", "value"),
    "electra": ("query", "value"),
    "albert": ("query", "value"),
    "big_bird": ("query", "value"),
    "roformer": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),  # PEFT has no default here
}
"""Model type → layers adapted where none are named: PEFT's, plus DistilBERT and the other BERTs that Flax has."""

CLASSIFIER_HEADS = ("classifier", "score")
"""What PEFT trains whole in sequence classification, by suffix: so DistilBERT's `pre_classifier` too."""


def match_targets(
    sites: Mapping[str, Site],
    target_modules: str | Sequence[str],
    *,
    exclude_modules: str | Sequence[str] | None = None,
    whole_layers: Iterable[str] = (),
) -> dict[str, Site]:
    """Return the sites that `target_modules` names, by layer path.

    Args:
        sites: all linear layers, from `discover_sites`.
        target_modules: a string is a regular expression for the whole dotted name, or "all-linear"; a list matches a
            name exactly or its end after a dot.
        exclude_modules: the same forms; what it matches is left out first.
        whole_layers: paths of layers that train whole; they are never adapted.

    Raises:
        InputError: where an entry of `target_modules` matches nothing.
    """
    whole = set(whole_layers)
    free = {path: site for path, site in sites.items() if path not in whole}
    if exclude_modules:
        free = {path: site for path, site in free.items() if not _matches(path, exclude_modules)}
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return free
    chosen = {path: site for path, site in free.items() if _matches(path, target_modules)}
    for entry in [target_modules] if isinstance(target_modules, str) else target_modules:
        if not any(_matches(path, entry if isinstance(target_modules, str) else [entry]) for path in free):
            raise InputError(_no_match(entry, free, regex=isinstance(target_modules, str)))
    return chosen


def whole_modules(leaves: Iterable[str], modules_to_save: Sequence[str]) -> set[str]:
    """Return the leaf paths below the modules whose dotted name ends in an entry of `modules_to_save`, as PEFT matches them.

    Raises:
        InputError: where an entry matches no module.
    """
    leaves = list(leaves)
    modules = {"/".join(parts[:i]) for parts in (leaf.split("/") for leaf in leaves) for i in range(1, len(parts))}
    chosen: set[str] = set()
    for entry in modules_to_save:
        matched = {module for module in modules if module.replace("/", ".").endswith(entry)}
        if not matched:
            names = {module.rpartition("/")[2] for module in modules}
            raise InputError(
                f"modules_to_save '{entry}' matches no module{near(entry, names)}; there are {_list(names)}"
            )
        chosen |= {leaf for leaf in leaves if any(leaf.startswith(module + "/") for module in matched)}
    return chosen


def _matches(path: str, pattern: str | Sequence[str]) -> bool:
    name = path.replace("/", ".")
    if isinstance(pattern, str):
        try:
            return re.fullmatch(pattern, name) is not None
        except re.error as error:
            raise InputError(f"'{pattern}' is not a regular expression: {error}") from error
    return any(name == entry or name.endswith(f".{entry}") for entry in pattern)


def _no_match(entry: str, sites: Mapping[str, Site], *, regex: bool) -> str:
    names = {path.rpartition("/")[2] for path in sites}
    if not regex:
        return f"target_modules '{entry}' matches no layer{near(entry, names)}; this model's linear layers end in {_list(names)}"
    hint = (
        f"for layers by name write a list, [{entry}]"
        if re.fullmatch(r"[\w., ]+", entry)
        else "it must match whole names"
    )
    example = next(iter(sites), "").replace("/", ".")
    return f"target_modules '{entry}', read as a regular expression, matches no layer: {hint} (a name: {example})"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(name for name in names if not name.isdigit()))
