"""PEFT's file formats, one file for each of its methods; conversion happens in `interop` and nowhere else."""

from jaxpeft.interop.formats.adalora import AdaLoraFormat
from jaxpeft.interop.formats.bitfit import BitFitFormat
from jaxpeft.interop.formats.contract import Format
from jaxpeft.interop.formats.hira import HiraFormat
from jaxpeft.interop.formats.ia3 import Ia3Format
from jaxpeft.interop.formats.ln_tuning import LnTuningFormat
from jaxpeft.interop.formats.loha import LohaFormat
from jaxpeft.interop.formats.lokr import LokrFormat
from jaxpeft.interop.formats.lora import LoraFormat
from jaxpeft.interop.formats.prompt_tuning import PromptTuningFormat
from jaxpeft.interop.formats.vera import VeraFormat

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
