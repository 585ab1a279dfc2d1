"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) and its relatives: BERT's modules, with positions counted after padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxpeft.families.base import FeedForward
from jaxpeft.families.bert import BERT

if TYPE_CHECKING:
    import jax

XLM_ROBERTA = replace(
    BERT,
    model_type="xlm-roberta",
    citation="XLM-RoBERTa: Conneau et al. 2019, arXiv 1911.02116",
    # transformers 4.57 calls its base model "xlm-roberta", but its encoder is RoBERTa's module under RoBERTa's name.
    base_prefix="roberta",
    positions_after_padding=True,
)

ROBERTA = replace(
    XLM_ROBERTA,
    model_type="roberta",
    citation="RoBERTa: Liu et al. 2019, arXiv 1907.11692",
    base_prefix=None,
    # PEFT's choice, for RoBERTa only.
    default_targets={**BERT.default_targets, "adalora": ("query", "key", "value", "dense")},
)


def feed_forward(module: Any, activation: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`FlaxRobertaPreLayerNormIntermediate`."""
    return activation(module.dense(module.LayerNorm(x)))


ROBERTA_PRELAYERNORM = replace(
    XLM_ROBERTA,
    model_type="roberta-prelayernorm",
    citation="RoBERTa-PreLayerNorm (fairseq): Ott et al. 2019, arXiv 1904.01038",
    base_prefix=None,
    # Its attention block normalises before the keys, so queries cannot be taken from the block's input.
    last_layer=None,
    feed_forward=FeedForward("encoder/layer/{number}/intermediate", feed_forward, "hidden_act"),
)
