"""Adapter methods: one file each, on one contract (`base.py`).

A new method is a new file and a line in `METHODS`. The baselines "full" and "head" are not methods: they only train
parameters of the model itself. Importing this package loads no method and not jax either, so that `--help` answers at once.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxpeft.registry import Registry as _Registry

METHODS = _Registry(
    "adapter method",
    {
        "lora": "jaxpeft.adapters.lora:Lora",
        "hira": "jaxpeft.adapters.hira:Hira",
        "sora": "jaxpeft.adapters.sora:Sora",
        "loha": "jaxpeft.adapters.loha:Loha",
        "lokr": "jaxpeft.adapters.lokr:Lokr",
        "vera": "jaxpeft.adapters.vera:Vera",
        "adalora": "jaxpeft.adapters.adalora:AdaLora",
        "shira": "jaxpeft.adapters.shira:Shira",
        "supertuning": "jaxpeft.adapters.shira:SuperTuning",
        "s2ft": "jaxpeft.adapters.s2ft:S2ft",
        "ia3": "jaxpeft.adapters.ia3:Ia3",
        "bitfit": "jaxpeft.adapters.bitfit:BitFit",
        "ln-tuning": "jaxpeft.adapters.ln_tuning:LnTuning",
        "prompt-tuning": "jaxpeft.adapters.prompt_tuning:PromptTuning",
    },
)
"""Name → class, in the order of the README's table."""

if _TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports a class at its first use
    from jaxpeft.adapters.adalora import AdaLora as AdaLora
    from jaxpeft.adapters.base import Description as Description
    from jaxpeft.adapters.base import FrozenLayer as FrozenLayer
    from jaxpeft.adapters.base import HasConstants as HasConstants
    from jaxpeft.adapters.base import Method as Method
    from jaxpeft.adapters.base import ModifiesBase as ModifiesBase
    from jaxpeft.adapters.base import SharesFactors as SharesFactors
    from jaxpeft.adapters.base import Site as Site
    from jaxpeft.adapters.base import SiteMethod as SiteMethod
    from jaxpeft.adapters.bitfit import BitFit as BitFit
    from jaxpeft.adapters.hira import Hira as Hira
    from jaxpeft.adapters.ia3 import Ia3 as Ia3
    from jaxpeft.adapters.ln_tuning import LnTuning as LnTuning
    from jaxpeft.adapters.loha import Loha as Loha
    from jaxpeft.adapters.lokr import Lokr as Lokr
    from jaxpeft.adapters.lora import Lora as Lora
    from jaxpeft.adapters.prompt_tuning import PromptTuning as PromptTuning
    from jaxpeft.adapters.s2ft import S2ft as S2ft
    from jaxpeft.adapters.shira import Shira as Shira
    from jaxpeft.adapters.shira import SuperTuning as SuperTuning
    from jaxpeft.adapters.sora import Sora as Sora
    from jaxpeft.adapters.vera import Vera as Vera

_CONTRACT = (
    "Description",
    "FrozenLayer",
    "HasConstants",
    "Method",
    "ModifiesBase",
    "SharesFactors",
    "Site",
    "SiteMethod",
)
_CLASSES = {
    "AdaLora": "adalora",
    "BitFit": "bitfit",
    "Hira": "hira",
    "Ia3": "ia3",
    "LnTuning": "ln-tuning",
    "Loha": "loha",
    "Lokr": "lokr",
    "Lora": "lora",
    "PromptTuning": "prompt-tuning",
    "S2ft": "s2ft",
    "Shira": "shira",
    "SuperTuning": "supertuning",
    "Sora": "sora",
    "Vera": "vera",
}

__all__ = [
    "METHODS",
    "AdaLora",
    "BitFit",
    "Description",
    "FrozenLayer",
    "HasConstants",
    "Hira",
    "Ia3",
    "LnTuning",
    "Loha",
    "Lokr",
    "Lora",
    "Method",
    "ModifiesBase",
    "PromptTuning",
    "S2ft",
    "SharesFactors",
    "Shira",
    "Site",
    "SiteMethod",
    "Sora",
    "SuperTuning",
    "Vera",
]


def __getattr__(name: str) -> object:
    if name in _CONTRACT:
        return getattr(_import_module("jaxpeft.adapters.base"), name)
    if name in _CLASSES:
        return METHODS[_CLASSES[name]]
    raise AttributeError(f"module 'jaxpeft.adapters' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
