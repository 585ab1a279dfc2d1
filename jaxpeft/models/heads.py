"""The heads on encoders: the Flax classes of transformers that have one, and what PEFT calls it. No other file names these classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from jaxpeft.registry import Registry


@dataclass(frozen=True)
class Head:
    """The head of a task.

    Attributes:
        mapping: place of transformers' mapping from a config's class to the Flax class with this head, "module:attribute".
        peft_task_type: PEFT's `task_type`; None if PEFT has none for it.
        ties_words: True if the decoder is the table of word embeddings, unless the config unties them.
    """

    mapping: str
    peft_task_type: str | None = None
    ties_words: bool = False

    @property
    def flax_classes(self) -> Mapping[type, Any]:
        """Class of the config → Flax class with this head."""
        module, _, attribute = self.mapping.partition(":")
        return getattr(import_module(module), attribute)


MASKED_LM = Head("transformers:FLAX_MODEL_FOR_MASKED_LM_MAPPING", ties_words=True)
CLASSIFICATION = Head("transformers:FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", peft_task_type="SEQ_CLS")

HEADS = Registry(
    "task", {"masked-lm": "jaxpeft.models.heads:MASKED_LM", "classification": "jaxpeft.models.heads:CLASSIFICATION"}
)
"""The name of a head (`Task.head`) → the head."""
