"""A merged model as transformers saves one: loads in torch (`from_pretrained`) and, here or in Flax, as a base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.models.build import Model
from jaxpeft.models.checkpoint import to_torch_layout, torch_name
from jaxpeft.paths import Params, leaf_paths


def save_model(
    directory: Path | str,
    model: Model,
    params: Params,
    *,
    tokenizer: Any = None,
    label_names: Sequence[str] | None = None,
) -> Path:
    """Write `params` (plain, from `merge`) with the model's config and tokenizer; return the weights' file, in torch's layout."""
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        torch_name(path): to_torch_layout(path, np.asarray(leaf, np.float32))
        for path, leaf in leaf_paths(params).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [model.torch_class]
    config.dtype = "float32"  # what the file holds, whatever the base was stored in
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    config.save_pretrained(str(directory))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return directory / "model.safetensors"
