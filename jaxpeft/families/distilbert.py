"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): its layers have other names and boundaries than BERT's.

PEFT has no default targets for it; these are jaxpeft's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxpeft.families.base import Attention, Family, FeedForward, LastLayer, Projections, Scores, split_heads

if TYPE_CHECKING:
    import jax


def attend(
    module: Any, scores: Scores, *, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, **_: Any
) -> tuple[jax.Array]:
    """`FlaxMultiHeadSelfAttention`, with its output projection, which is inside it."""
    layers, heads = ((module.q_lin, query), (module.k_lin, key), (module.v_lin, value)), module.n_heads
    q, k, v = (split_heads(layer(x), heads) for layer, x in layers)
    return (module.out_lin(scores(q, k, v, mask).reshape(query.shape)),)


def layer_of_some(
    module: Any,
    *,
    take: Callable[[jax.Array], jax.Array],
    hidden_states: jax.Array,
    attn_mask: jax.Array,
    deterministic: bool,
    **_: Any,
) -> tuple[jax.Array]:
    """`FlaxTransformerBlock` for the tokens that `take` keeps. The block adds its residuals itself, so all of it is here."""
    taken = take(hidden_states)
    inputs = {"query": taken, "key": hidden_states, "value": hidden_states, "mask": attn_mask}
    attended = module.sa_layer_norm(module.attention(**inputs, deterministic=deterministic)[0] + taken)
    return (module.output_layer_norm(module.ffn(attended, deterministic=deterministic) + attended),)


def feed_forward(
    module: Any, activation: Callable[[jax.Array], jax.Array], x: jax.Array, *, deterministic: bool
) -> jax.Array:
    """`FlaxFFN`."""
    return module.dropout(module.lin2(activation(module.lin1(x))), deterministic=deterministic)


def packing_obstacle(config: Any) -> str | None:
    """Sines are computed for the places in a row, so a second text in it cannot start at position 0."""
    if getattr(config, "sinusoidal_pos_embds", False):
        return "needs position embeddings, and this DistilBERT computes sines"
    return None


DISTILBERT = Family(
    "distilbert",
    citation="DistilBERT: Sanh et al. 2019, arXiv 1910.01108",
    default_targets={
        "attention_qv": ("q_lin", "v_lin"),
        "attention_kv_feedforward": ("k_lin", "v_lin", "lin2"),
        "feedforward": ("lin2",),
        "adalora": ("q_lin", "v_lin"),
        "output_projections": ("out_lin", "lin2"),
        "attention_output": ("out_lin",),
    },
    word_embeddings="word_embeddings",
    norms=r".*(LayerNorm|layer_norm)",
    classifier_heads=("classifier",),  # a name matches as an ending, so `pre_classifier` too
    dropout_rates=("dropout", "attention_dropout", "seq_classif_dropout", "qa_dropout"),
    attention=Attention(
        "transformer/layer/{number}/attention",
        attend,
        dropout_rate="attention_dropout",
        broadcast_dropout=False,
        dropout_module="dropout",
        position_module="embeddings/position_embeddings",
        packing_obstacle=packing_obstacle,
    ),
    after_attention="transformer/layer/{last}/sa_layer_norm",
    last_layer=LastLayer("transformer/layer/{last}", layer_of_some),
    feed_forward=FeedForward("transformer/layer/{number}/ffn", feed_forward, "activation"),
    projections=Projections(
        query="transformer/layer/{number}/attention/q_lin",
        key="transformer/layer/{number}/attention/k_lin",
        value="transformer/layer/{number}/attention/v_lin",
        attention_output="transformer/layer/{number}/attention/out_lin",
        intermediate="transformer/layer/{number}/ffn/lin1",
        output="transformer/layer/{number}/ffn/lin2",
        activation="activation",
    ),
)
