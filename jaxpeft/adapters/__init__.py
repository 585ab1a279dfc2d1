"""Adapter methods: one file each, on one contract. The baselines "full" and "head" have no method: whole leaves train."""

from jaxpeft.adapters.adalora import AdaLora
from jaxpeft.adapters.base import FrozenLayer, Method, Site, SiteMethod
from jaxpeft.adapters.bitfit import BitFit
from jaxpeft.adapters.hira import Hira
from jaxpeft.adapters.ia3 import Ia3
from jaxpeft.adapters.ln_tuning import LnTuning
from jaxpeft.adapters.loha import Loha
from jaxpeft.adapters.lokr import Lokr
from jaxpeft.adapters.lora import Lora
from jaxpeft.adapters.prompt_tuning import PromptTuning
from jaxpeft.adapters.vera import Vera

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "hira": Hira,
    "ia3": Ia3,
    "vera": Vera,
    "loha": Loha,
    "lokr": Lokr,
    "adalora": AdaLora,
    "ln-tuning": LnTuning,
    "bitfit": BitFit,
    "prompt-tuning": PromptTuning,
}

__all__ = [
    "METHODS",
    "AdaLora",
    "BitFit",
    "FrozenLayer",
    "Hira",
    "Ia3",
    "LnTuning",
    "Loha",
    "Lokr",
    "Lora",
    "Method",
    "PromptTuning",
    "Site",
    "SiteMethod",
    "Vera",
]
