"""Check that the tensors of a file are those of the method and of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.interop.peft.format import Format
from jaxpeft.interop.peft.weights import CONFIG_FILE, weights_file


def no_place(file: Path, name: str, known: Mapping[str, str]) -> str:
    """Why the tensor `name` of `file` cannot be loaded; `known` are the model's own names."""
    if name.endswith(("decoder.weight", "vocab_projector.weight")):
        return (
            f"{file}: '{name}' was trained apart from the word embeddings, and the Flax model's decoder is tied to them: "
            "train it with modules_to_save that names the head's layers, not the whole head"
        )
    return f"{file}: '{name}' belongs to no layer of this model{did_you_mean(name, known)}"


def check_site(
    group: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], form: Format, where: str, directory: Path
) -> None:
    """Check the tensors of one site.

    Args:
        group: the tensors, by our names.
        shapes: those that the method and the model ask for.
        form: the format, for the file's names.
        where: the site, for messages.
        directory: the adapter's.

    Raises:
        InputError: if a tensor is missing, was not asked for, or has another shape.
    """
    keys = {
        name: key for key, name in {**form.embedding_keys, **form.alone_keys, **form.keys, **form.shared_keys}.items()
    }
    for name in [*shapes, *group]:
        if name not in group:
            # The generic format knows only the parameters that the file has.
            raise InputError(
                f"{weights_file(directory)}: {where} has no {keys.get(name, name)}; the file is incomplete"
            )
        if name not in shapes:
            raise InputError(f"{directory}: {where} has {keys[name]}, which {CONFIG_FILE} does not ask for")
        if group[name].shape != shapes[name]:
            raise InputError(
                f"{directory}: {keys[name]} of {where} has shape {group[name].shape[::-1]}, and this base and {CONFIG_FILE} "
                f"ask for {shapes[name][::-1]}: the adapter was trained on another base, or the config has another rank"
            )
