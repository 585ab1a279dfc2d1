"""The names of a classifier's classes: in transformers' config, and in a file beside an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS_FILE = "labels.json"
"""The file with the classes' names beside an adapter, whose own files have no place for them."""


def class_names(config: Any) -> tuple[str, ...] | None:
    """The classes' names in transformers' `config`, in the order of their ids; None if they are only LABEL_0, LABEL_1, …."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    if sorted(names) != list(range(len(names))) or all(re.fullmatch(r"LABEL_\d+", name) for name in names.values()):
        return None
    return tuple(names[number] for number in range(len(names)))


def label_maps(names: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    """Transformers' `id2label` and `label2id` for the classes' `names`, in the order of their ids."""
    return dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def save_label_names(directory: Path | str, names: Sequence[str]) -> Path:
    """Write the classes' `names`, in the order of their ids, as `labels.json` with `id2label` and `label2id`."""
    id2label, label2id = label_maps(names)
    file = Path(directory) / LABELS_FILE
    text = json.dumps({"id2label": id2label, "label2id": label2id}, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file
