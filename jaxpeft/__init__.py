"""jaxpeft: parameter-efficient fine-tuning of Flax transformers in pure JAX.

The public names, imported when they are first used: `import jaxpeft` itself loads nothing heavy.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "AdaLora": "jaxpeft.adapters",
    "BaseInfo": "jaxpeft.interop.peft_files",
    "BitFit": "jaxpeft.adapters",
    "FourBitTensor": "jaxpeft.quant",
    "Hira": "jaxpeft.adapters",
    "Ia3": "jaxpeft.adapters",
    "InputError": "jaxpeft.errors",
    "Int8Tensor": "jaxpeft.quant",
    "LnTuning": "jaxpeft.adapters",
    "Loha": "jaxpeft.adapters",
    "Lokr": "jaxpeft.adapters",
    "Lora": "jaxpeft.adapters",
    "Model": "jaxpeft.models.build",
    "PromptTuning": "jaxpeft.adapters",
    "Quantization": "jaxpeft.quant",
    "RunConfig": "jaxpeft.config",
    "Vera": "jaxpeft.adapters",
    "apply": "jaxpeft.inject",
    "calibrate": "jaxpeft.calibration",
    "count": "jaxpeft.paths",
    "dequantize": "jaxpeft.quant",
    "discover_sites": "jaxpeft.inject",
    "hold_pruned_at_zero": "jaxpeft.training.optimizer",
    "init_adapters": "jaxpeft.adapters.init",
    "load_adapter": "jaxpeft.interop.peft_files",
    "load_model": "jaxpeft.models.build",
    "load_run": "jaxpeft.finished",
    "load_tokenizer": "jaxpeft.models.build",
    "match_targets": "jaxpeft.targets",
    "merge": "jaxpeft.merging",
    "prune": "jaxpeft.pruning.masks",
    "quantize": "jaxpeft.quant",
    "quantize_model": "jaxpeft.quantizing",
    "save_adapter": "jaxpeft.interop.peft_files",
    "save_model": "jaxpeft.interop.merged",
    "train": "jaxpeft.experiment:run",
    "unmerge": "jaxpeft.merging",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module, _, attribute = _PUBLIC[name].partition(":")
        return getattr(import_module(module), attribute or name)
    raise AttributeError(f"module 'jaxpeft' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
