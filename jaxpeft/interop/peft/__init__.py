"""PEFT's files: an adapter's configuration and weights, both ways. Conversion happens in this folder and nowhere else.

Each format of PEFT is one file here and a line in `FORMATS`. A method without a line is written in jaxpeft's own format
(`generic.py`), which PEFT cannot load.
"""

from jaxpeft.registry import Registry as _Registry

FORMATS = _Registry(
    "PEFT format",
    {
        "bitfit": "jaxpeft.interop.peft.bitfit:BitFitFormat",
        "lora": "jaxpeft.interop.peft.lora:LoraFormat",
        "hira": "jaxpeft.interop.peft.hira:HiraFormat",
        "shira": "jaxpeft.interop.peft.shira:ShiraFormat",
        "supertuning": "jaxpeft.interop.peft.supertuning:SuperTuningFormat",
        "s2ft": "jaxpeft.interop.peft.shira:S2ftFormat",
        "ia3": "jaxpeft.interop.peft.ia3:Ia3Format",
        "vera": "jaxpeft.interop.peft.vera:VeraFormat",
        "loha": "jaxpeft.interop.peft.loha:LohaFormat",
        "lokr": "jaxpeft.interop.peft.lokr:LokrFormat",
        "adalora": "jaxpeft.interop.peft.adalora:AdaLoraFormat",
        "ln-tuning": "jaxpeft.interop.peft.ln_tuning:LnTuningFormat",
        "prompt-tuning": "jaxpeft.interop.peft.prompt_tuning:PromptTuningFormat",
    },
)
"""Name of the method → class of its format. The first format that accepts a file reads it: BitFit's file is a special LoRA."""
