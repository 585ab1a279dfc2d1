"""Encoder families: what jaxpeft must know of an architecture beyond what transformers says. One file per family.

No other part of jaxpeft names a `model_type`. To add an architecture, write a `Family` in a new file and add its line to
`FAMILIES`.
"""

from __future__ import annotations

from typing import Any

from jaxpeft.errors import InputError
from jaxpeft.families.base import Family
from jaxpeft.registry import Registry

FAMILIES = Registry(
    "encoder family",
    {
        "bert": "jaxpeft.families.bert:BERT",
        "electra": "jaxpeft.families.bert:ELECTRA",
        "albert": "jaxpeft.families.bert:ALBERT",
        "big_bird": "jaxpeft.families.bert:BIG_BIRD",
        "roformer": "jaxpeft.families.bert:ROFORMER",
        "roberta": "jaxpeft.families.roberta:ROBERTA",
        "xlm-roberta": "jaxpeft.families.roberta:XLM_ROBERTA",
        "roberta-prelayernorm": "jaxpeft.families.roberta:ROBERTA_PRELAYERNORM",
        "distilbert": "jaxpeft.families.distilbert:DISTILBERT",
    },
)
"""Transformers' `model_type` → `Family`."""


def family_of(model_type: str) -> Family:
    """Return the family of transformers' `model_type`; for any other architecture, one whose optional parts are all None."""
    return FAMILIES[model_type] if model_type in FAMILIES else Family(model_type)


def known(part: str) -> dict[str, Any]:
    """Return `model_type` → value of the attribute `part`, for the families that have it.

    `known("attention")` has no "albert": there `Family.attention` is None.
    """
    values = {name: getattr(family, part) for name, family in FAMILIES.items()}
    return {name: value for name, value in values.items() if value}


def required(family: Family, part: str, needed_by: str) -> Any:
    """Return the attribute `part` of `family`; `needed_by` is the option that needs it, for the message.

    Raises:
        InputError: if the family does not have it, with the families that do.
    """
    value = getattr(family, part)
    if value:
        return value
    words = part.replace("_", " ")
    raise InputError(
        f"{needed_by}: jaxpeft does not know the {words} of '{family.model_type}'; it is known for {', '.join(known(part))}"
    )
