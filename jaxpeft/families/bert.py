"""BERT (Devlin et al. 2018, arXiv 1810.04805), and the encoders whose Flax modules are copies of its own.

PEFT has default targets for `bert`, `roberta` and, for LoRA and its relatives, `xlm-roberta` and `electra`. The others are
ours, by analogy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxpeft.families.base import Attention, Family, FeedForward, LastLayer, Projections, Scores, split_heads

if TYPE_CHECKING:
    import jax


def attend(module: Any, scores: Scores, x: jax.Array, segments: jax.Array, *_: Any, **options: Any) -> tuple[jax.Array]:
    """`FlaxBertSelfAttention` on `x: [rows, length, d]`, without its output projection, which is a module of its own.

    With `key_value_states`, x holds only the tokens whose queries are needed.
    """
    assert options.get("layer_head_mask") is None
    heads, read = module.config.num_attention_heads, options.get("key_value_states")
    read = x if read is None else read
    layers = ((module.query, x), (module.key, read), (module.value, read))
    query, key, value = (split_heads(layer(x), heads) for layer, x in layers)
    return (scores(query, key, value, segments).reshape(x.shape),)


def attention_of_some(
    module: Any,
    x: jax.Array,
    mask: jax.Array,
    *,
    take: Callable[[jax.Array], jax.Array],
    layer_head_mask: Any,
    deterministic: bool,
    **_: Any,
) -> tuple[jax.Array]:
    """`FlaxBertAttention` for the tokens that `take` keeps.

    It calls the module's cross-attention, as a decoder does: queries of these tokens, keys and values of all.
    """
    taken = take(x)
    options = {"layer_head_mask": layer_head_mask, "key_value_states": x, "deterministic": deterministic}
    attended = module.self(taken, mask, **options)[0]
    return (module.output(attended, taken, deterministic=deterministic),)


def feed_forward(module: Any, activation: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`FlaxBertIntermediate`."""
    return activation(module.dense(x))


BERT = Family(
    "bert",
    citation="BERT: Devlin et al. 2018, arXiv 1810.04805",
    default_targets={
        "attention_qv": ("query", "value"),
        "attention_kv_feedforward": ("key", "value", "output.dense"),
        # As in PEFT. The name also matches the output projection of attention.
        "feedforward": ("output.dense",),
        "adalora": ("query", "value"),
        "output_projections": ("output.dense",),
        "attention_output": ("attention.output.dense",),
    },
    word_embeddings="word_embeddings",
    norms=r".*(LayerNorm|layer_norm)",
    classifier_heads=("classifier",),
    dropout_rates=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
    attention=Attention(
        "encoder/layer/{number}/attention/self",
        attend,
        dropout_rate="attention_probs_dropout_prob",
        broadcast_dropout=True,
    ),
    after_attention="encoder/layer/{last}/attention/output",
    last_layer=LastLayer("encoder/layer/{last}/attention", attention_of_some),
    feed_forward=FeedForward("encoder/layer/{number}/intermediate", feed_forward, "hidden_act"),
    projections=Projections(
        query="encoder/layer/{number}/attention/self/query",
        key="encoder/layer/{number}/attention/self/key",
        value="encoder/layer/{number}/attention/self/value",
        attention_output="encoder/layer/{number}/attention/output/dense",
        intermediate="encoder/layer/{number}/intermediate/dense",
        output="encoder/layer/{number}/output/dense",
        activation="hidden_act",
    ),
)

ELECTRA = replace(BERT, model_type="electra", citation="ELECTRA: Clark et al. 2020, arXiv 2003.10555")

# The encoders below compute attention in ways of their own (shared layers, sparse blocks, rotary positions), which are not
# implemented here yet.
_OTHER_ATTENTION = replace(
    BERT, attention=None, after_attention=None, last_layer=None, feed_forward=None, projections=None
)

ALBERT = replace(
    _OTHER_ATTENTION,
    model_type="albert",
    citation="ALBERT: Lan et al. 2019, arXiv 1909.11942",
    default_targets={
        **BERT.default_targets,
        # Its feed-forward output has a name of its own, so attention's output is left out, as in the paper of (IA)³.
        "attention_kv_feedforward": ("key", "value", "ffn_output"),
        "feedforward": ("ffn_output",),
        "output_projections": ("attention.dense", "ffn_output"),
        "attention_output": ("attention.dense",),
    },
    dropout_rates=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
)

BIG_BIRD = replace(_OTHER_ATTENTION, model_type="big_bird", citation="BigBird: Zaheer et al. 2020, arXiv 2007.14062")

ROFORMER = replace(_OTHER_ATTENTION, model_type="roformer", citation="RoFormer: Su et al. 2021, arXiv 2104.09864")
