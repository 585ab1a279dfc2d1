"""Loads the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError


def load_tokenizer(directory: Path | str) -> Any:
    """Load the fast tokenizer from the files in `directory`.

    Raises:
        InputError: if there is none, or its files cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), use_fast=True)
    except Exception as error:  # of any class: tokenizers has none of its own for a file that it cannot parse
        if (Path(directory) / "tokenizer.json").exists():
            message = (
                f"{directory}/tokenizer.json cannot be read ({error}); name another tokenizer with --model.tokenizer"
            )
        else:
            message = f"no tokenizer in {directory}; name one with --model.tokenizer"
        raise InputError(message) from error
