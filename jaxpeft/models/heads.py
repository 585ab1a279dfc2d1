"""The heads on encoders: the Flax classes of transformers that have one, and what PEFT calls it. No other file names these classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from typing import Any

import jax.numpy as jnp

from jaxpeft.errors import InputError, check_choice
from jaxpeft.registry import Registry


@dataclass(frozen=True)
class Head:
    """The head of a task.

    Attributes:
        mapping: place of transformers' mapping from a config's class to the Flax class with this head, "module:attribute".
        peft_task_type: PEFT's `task_type`; None if PEFT has none for it.
        has_classes: True if it has an output for each class.
        num_outputs: the number of its outputs, if that is always the same.
        ties_words: True if the decoder is the table of word embeddings, unless the config unties them.
        peft_drops_token_types: True if PEFT's class for its task type does not pass `token_type_ids` on to the model (0.21).
        modules: names of the modules that are trained if the task trains its head, each as an ending; None: the family's
            `classifier_heads`.
        logits: takes the logits out of the output of the Flax module.
        is_bare: True if there is no head: the model is the encoder alone, and its paths do not begin with the encoder's name.
        module_options: fields of the Flax module to set, for the modules that have them.
        among: place of another mapping; only architectures that it has too can be used. None: all can.
    """

    mapping: str
    peft_task_type: str | None = None
    ties_words: bool = False
    has_classes: bool = True
    num_outputs: int | None = None
    peft_drops_token_types: bool = False
    modules: tuple[str, ...] | None = None
    logits: Callable[[Any], Any] = attrgetter("logits")
    is_bare: bool = False
    module_options: Mapping[str, Any] = field(default_factory=dict)
    among: str | None = None

    def flax_class(self, config_type: type) -> Any | None:
        """The Flax class with this head for models with such a config; None if there is none."""
        mapping = _at(self.mapping)
        return (
            mapping[config_type] if config_type in mapping and config_type in _at(self.among or self.mapping) else None
        )

    @property
    def model_types(self) -> list[str]:
        """Transformers' names of the architectures that have this head, sorted."""
        mapping = _at(self.mapping)
        return sorted(config.model_type for config in _at(self.among or self.mapping) if config in mapping)


def _at(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def _start_and_end(out: Any) -> Any:
    """`[rows, length, 2]`: that an answer starts with a token, and that it ends with it."""
    return jnp.stack([out.start_logits, out.end_logits], axis=-1)


MASKED_LM = Head("transformers:FLAX_MODEL_FOR_MASKED_LM_MAPPING", ties_words=True, has_classes=False)
CLASSIFICATION = Head("transformers:FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", peft_task_type="SEQ_CLS")
TOKEN_CLASSIFICATION = Head("transformers:FLAX_MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", peft_task_type="TOKEN_CLS")

QUESTION_ANSWERING = Head(
    "transformers:FLAX_MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    peft_task_type="QUESTION_ANS",
    num_outputs=2,
    peft_drops_token_types=True,
    modules=("qa_outputs",),
    logits=_start_and_end,
)

# The bare encoders. Decoders, which have no masked-LM class, and a pooler, which no embedding here reads, are left out.
SENTENCE_EMBEDDINGS = Head(
    "transformers:FLAX_MODEL_MAPPING",
    peft_task_type="FEATURE_EXTRACTION",
    has_classes=False,
    logits=attrgetter("last_hidden_state"),
    is_bare=True,
    module_options={"add_pooling_layer": False},
    among="transformers:FLAX_MODEL_FOR_MASKED_LM_MAPPING",
)

HEADS = Registry(
    "task",
    {
        "masked-lm": "jaxpeft.models.heads:MASKED_LM",
        "classification": "jaxpeft.models.heads:CLASSIFICATION",
        "token-classification": "jaxpeft.models.heads:TOKEN_CLASSIFICATION",
        "question-answering": "jaxpeft.models.heads:QUESTION_ANSWERING",
        "sentence-embeddings": "jaxpeft.models.heads:SENTENCE_EMBEDDINGS",
    },
)
"""The name of a head (`Task.head`) → the head."""


def check_request(task: str, *, num_labels: int | None, dtype: str, dropout: float | None) -> None:
    """Check the arguments of `load_model` that need no file.

    Raises:
        InputError: there is no such task or dtype, `num_labels` is below 1 or does not fit the task, or `dropout` is no rate.
    """
    HEADS.check(task)
    check_choice("dtype", dtype, ("float32", "bfloat16"))
    if num_labels is not None and num_labels < 1:
        raise InputError(f"num_labels is {num_labels}; it must be at least 1 (1: regression)")
    if num_labels is not None and not HEADS[task].has_classes:
        raise InputError(f"num_labels is {num_labels}, but {task} has no classes; leave it out")
    outputs = HEADS[task].num_outputs
    if num_labels is not None and outputs is not None and num_labels != outputs:
        raise InputError(f"num_labels is {num_labels}, but {task} always has {outputs} outputs; leave it out")
    if dropout is not None and not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}; it must be at least 0 and below 1, or None")
