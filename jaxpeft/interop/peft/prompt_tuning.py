"""PROMPT_TUNING in PEFT's files: one tensor, `prompt_embeddings [n, dim]`, and a head under `base_model.` alone.

PEFT 0.21 has prompt tuning for its own task types only: for masked-lm, which has none, `get_peft_model` fails with KeyError. Such a
file is written all the same, for this library. For DistilBERT PEFT cannot find the model's sizes: the file says them.
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
        """PEFT's options.

        Raises:
            InputError: for TEXT without the text or its tokenizer's name, which PEFT demands of every file.
        """
        text = method.prompt_tuning_init == "TEXT"
        if text and (method.prompt_tuning_init_text is None or not method.tokenizer_name_or_path):
            raise InputError(
                "prompt_tuning_init TEXT: PEFT's file says the text and its tokenizer; give the method "
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
        """A key that is absent has PEFT's default.

        Raises:
            InputError: without num_virtual_tokens, for which PEFT has none.
        """
        if not config.get("num_virtual_tokens"):
            raise InputError("the adapter's config has no num_virtual_tokens; it is no prompt tuning of PEFT's")
        return PromptTuning(
            num_virtual_tokens=config["num_virtual_tokens"],
            prompt_tuning_init=config.get("prompt_tuning_init") or "RANDOM",
            prompt_tuning_init_text=config.get("prompt_tuning_init_text"),
            tokenizer_name_or_path=config.get("tokenizer_name_or_path"),
            tokenizer_kwargs=config.get("tokenizer_kwargs"),
        )
