"""PEFT's file formats, one file for each of its methods; conversion happens in `interop` and nowhere else."""

from jaxpeft.interop.peft.adalora import AdaLoraFormat
from jaxpeft.interop.peft.bitfit import BitFitFormat
from jaxpeft.interop.peft.format import Format
from jaxpeft.interop.peft.hira import HiraFormat
from jaxpeft.interop.peft.ia3 import Ia3Format
from jaxpeft.interop.peft.ln_tuning import LnTuningFormat
from jaxpeft.interop.peft.loha import LohaFormat
from jaxpeft.interop.peft.lokr import LokrFormat
from jaxpeft.interop.peft.lora import LoraFormat
from jaxpeft.interop.peft.prompt_tuning import PromptTuningFormat
from jaxpeft.interop.peft.vera import VeraFormat

# The first that reads a file is its format: BitFit's file is a LoRA of a special kind.
FORMATS: tuple[Format, ...] = (
    BitFitFormat(),
    LoraFormat(),
    HiraFormat(),
    Ia3Format(),
    VeraFormat(),
    LohaFormat(),
    LokrFormat(),
    AdaLoraFormat(),
    LnTuningFormat(),
    PromptTuningFormat(),
)

__all__ = ["FORMATS", "Format"]
