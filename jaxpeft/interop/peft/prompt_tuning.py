"""PROMPT_TUNING in PEFT's files: one tensor, `prompt_embeddings [n, dim]`, and a head with the prefix `base_model.`.

PEFT 0.21 has prompt tuning only for its own task types. Masked-lm is not one of them, so `get_peft_model` fails with KeyError; such a
file is written too, and only this library loads it. PEFT cannot find the sizes of a DistilBERT, so the file has them.
"""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import PromptTuning
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.format import Config, Format


class PromptTuningFormat(Format):
    """`prompt_embeddings`; the config names no layers."""

    peft_type = "PROMPT_TUNING"
    alone_keys = {"prompt_embeddings": "prompt"}  # noqa: RUF012
    module_prefix = "base_model."
    names_layers = False
    unsupported = {"num_transformer_submodules": 1}  # noqa: RUF012

    def to_config(self, method: PromptTuning) -> dict[str, Any]:
        """The method's keys in adapter_config.json.

        Raises:
            InputError: if TEXT lacks the text or its tokenizer's name, which PEFT demands of every file.
        """
        text = method.prompt_tuning_init == "TEXT"
        if text and (method.prompt_tuning_init_text is None or not method.tokenizer_name_or_path):
            raise InputError(
                "prompt_tuning_init TEXT: PEFT's file needs the text and its tokenizer; give the method "
                "prompt_tuning_init_text and tokenizer_name_or_path"
            )
        return {
            "num_virtual_tokens": method.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": method.prompt_tuning_init,
            "prompt_tuning_init_text": method.prompt_tuning_init_text,
            "tokenizer_name_or_path": method.tokenizer_name_or_path,
            "tokenizer_kwargs": None if method.tokenizer_kwargs is None else dict(method.tokenizer_kwargs),
        }

    def from_config(self, config: Config) -> PromptTuning:
        """A missing key has PEFT's default.

        Raises:
            InputError: if num_virtual_tokens is missing, for which PEFT has no default.
        """
        if not config.get("num_virtual_tokens"):
            raise InputError("the adapter's config has no num_virtual_tokens, which every prompt tuning of PEFT has")
        return PromptTuning(
            num_virtual_tokens=config["num_virtual_tokens"],
            prompt_tuning_init=config.get("prompt_tuning_init") or "RANDOM",
            prompt_tuning_init_text=config.get("prompt_tuning_init_text"),
            tokenizer_name_or_path=config.get("tokenizer_name_or_path"),
            tokenizer_kwargs=config.get("tokenizer_kwargs"),
        )
