"""jaxpeft: parameter-efficient fine-tuning of Flax transformers in pure JAX.

The public names, imported when they are first used: `import jaxpeft` itself loads nothing heavy.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports a name at its first use
    from jaxpeft.adapters import AdaLora as AdaLora
    from jaxpeft.adapters import BitFit as BitFit
    from jaxpeft.adapters import Hira as Hira
    from jaxpeft.adapters import Ia3 as Ia3
    from jaxpeft.adapters import LnTuning as LnTuning
    from jaxpeft.adapters import Loha as Loha
    from jaxpeft.adapters import Lokr as Lokr
    from jaxpeft.adapters import Lora as Lora
    from jaxpeft.adapters import PromptTuning as PromptTuning
    from jaxpeft.adapters import S2ft as S2ft
    from jaxpeft.adapters import Shira as Shira
    from jaxpeft.adapters import SuperTuning as SuperTuning
    from jaxpeft.adapters import Vera as Vera
    from jaxpeft.adapters.build import init_adapters as init_adapters
    from jaxpeft.calibration import calibrate as calibrate
    from jaxpeft.config import RunConfig as RunConfig
    from jaxpeft.errors import InputError as InputError
    from jaxpeft.inject import apply as apply
    from jaxpeft.inject import discover_sites as discover_sites
    from jaxpeft.interop.peft.files import BaseInfo as BaseInfo
    from jaxpeft.interop.peft.files import load_adapter as load_adapter
    from jaxpeft.interop.peft.files import save_adapter as save_adapter
    from jaxpeft.interop.quantize import quantize_model as quantize_model
    from jaxpeft.interop.transformers_files import save_model as save_model
    from jaxpeft.merging import merge as merge
    from jaxpeft.merging import unmerge as unmerge
    from jaxpeft.models.build import Model as Model
    from jaxpeft.models.build import load_model as load_model
    from jaxpeft.models.tokenizers import load_tokenizer as load_tokenizer
    from jaxpeft.pruning.masks import prune as prune
    from jaxpeft.quantization import FourBitTensor as FourBitTensor
    from jaxpeft.quantization import Int8Tensor as Int8Tensor
    from jaxpeft.quantization import Quantization as Quantization
    from jaxpeft.quantization import dequantize as dequantize
    from jaxpeft.quantization import quantize as quantize
    from jaxpeft.runs.load import load_run as load_run
    from jaxpeft.runs.train import run as train
    from jaxpeft.targets import match_targets as match_targets
    from jaxpeft.training.optimizer import hold_pruned_at_zero as hold_pruned_at_zero
    from jaxpeft.trees import count as count

_PUBLIC = {
    "AdaLora": "jaxpeft.adapters",
    "BaseInfo": "jaxpeft.interop.peft.files",
    "BitFit": "jaxpeft.adapters",
    "FourBitTensor": "jaxpeft.quantization",
    "Hira": "jaxpeft.adapters",
    "Ia3": "jaxpeft.adapters",
    "InputError": "jaxpeft.errors",
    "Int8Tensor": "jaxpeft.quantization",
    "LnTuning": "jaxpeft.adapters",
    "Loha": "jaxpeft.adapters",
    "Lokr": "jaxpeft.adapters",
    "Lora": "jaxpeft.adapters",
    "Model": "jaxpeft.models.build",
    "PromptTuning": "jaxpeft.adapters",
    "Quantization": "jaxpeft.quantization",
    "RunConfig": "jaxpeft.config",
    "S2ft": "jaxpeft.adapters",
    "Shira": "jaxpeft.adapters",
    "SuperTuning": "jaxpeft.adapters",
    "Vera": "jaxpeft.adapters",
    "apply": "jaxpeft.inject",
    "calibrate": "jaxpeft.calibration",
    "count": "jaxpeft.trees",
    "dequantize": "jaxpeft.quantization",
    "discover_sites": "jaxpeft.inject",
    "hold_pruned_at_zero": "jaxpeft.training.optimizer",
    "init_adapters": "jaxpeft.adapters.build",
    "load_adapter": "jaxpeft.interop.peft.files",
    "load_model": "jaxpeft.models.build",
    "load_run": "jaxpeft.runs.load",
    "load_tokenizer": "jaxpeft.models.tokenizers",
    "match_targets": "jaxpeft.targets",
    "merge": "jaxpeft.merging",
    "prune": "jaxpeft.pruning.masks",
    "quantize": "jaxpeft.quantization",
    "quantize_model": "jaxpeft.interop.quantize",
    "save_adapter": "jaxpeft.interop.peft.files",
    "save_model": "jaxpeft.interop.transformers_files",
    "train": "jaxpeft.runs.train:run",
    "unmerge": "jaxpeft.merging",
}

__all__ = [
    "AdaLora",
    "BaseInfo",
    "BitFit",
    "FourBitTensor",
    "Hira",
    "Ia3",
    "InputError",
    "Int8Tensor",
    "LnTuning",
    "Loha",
    "Lokr",
    "Lora",
    "Model",
    "PromptTuning",
    "Quantization",
    "RunConfig",
    "S2ft",
    "Shira",
    "SuperTuning",
    "Vera",
    "apply",
    "calibrate",
    "count",
    "dequantize",
    "discover_sites",
    "hold_pruned_at_zero",
    "init_adapters",
    "load_adapter",
    "load_model",
    "load_run",
    "load_tokenizer",
    "match_targets",
    "merge",
    "prune",
    "quantize",
    "quantize_model",
    "save_adapter",
    "save_model",
    "train",
    "unmerge",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(_import_module(module), attribute or name)
    raise AttributeError(f"module 'jaxpeft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(_PUBLIC))
