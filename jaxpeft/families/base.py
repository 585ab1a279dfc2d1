"""The contract of an encoder family: plain data and small functions, without jax and without transformers.

Every field but the name is optional. None means that jaxpeft does not know the value. A feature that needs it then raises
InputError (`jaxpeft.families.required`). An optimisation that needs it is skipped, and the results are the same.

Paths are Flax's, below the encoder (`encoder/layer/0/attention`), names of layers are endings of dotted names
(`attention.output.dense`), as in PEFT's `target_modules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax

Role = Literal[
    "attention_qv", "attention_kv_feedforward", "feedforward", "adalora", "output_projections", "attention_output"
]
"""What a method adapts by default: the projections of queries and values; those of keys and values, with the feed-forward
layers; the feed-forward layers that (IA)³ scales at their input; PEFT's choice for AdaLoRA; the output projections of attention and
of the feed-forward network; those of attention alone, whose inputs are heads.

A method names a role, a family says which layers play it. So neither knows the other.
"""

Scores = Callable[..., Any]
"""`(query, key, value, segments) → values`, as `jaxpeft.models.attention.Scores`."""


@dataclass(frozen=True)
class Attention:
    """Self-attention whose scores jaxpeft can compute itself: over several texts in a row, and by flash kernels.

    Attributes:
        path: path of each attention module, with `{number}` for the layer's index, counted from 0.
        attend: `(module, scores, *args, **kwargs) → (array,)`, called instead of the module with the arguments of its call.
            The mask argument holds segments, `[rows, length]`. Returns the module's output `[rows, length, d]` without the
            attention weights, as a tuple of one array.
        dropout_rate: the config's name for the rate at which attention weights are dropped.
        broadcast_dropout: True if the module draws one dropout mask for all rows and heads.
        dropout_module: the attribute that holds the module which drops attention weights; None: the attention module does.
        position_module: path of the position embeddings if the encoder counts positions itself. None if it takes
            `position_ids`.
        packing_obstacle: config → why several texts cannot share a row; None if they can.
    """

    path: str
    attend: Callable[..., tuple[jax.Array]]
    dropout_rate: str
    broadcast_dropout: bool
    dropout_module: str | None = None
    position_module: str | None = None
    packing_obstacle: Callable[[Any], str | None] = lambda config: None


@dataclass(frozen=True)
class LastLayer:
    """How to compute the last layer for only some of its tokens.

    Attributes:
        path: path of the module that `call` replaces, with `{last}` for the last layer's index.
        call: `(module, *args, take, **kwargs)` with the arguments of the module's call; `take` maps `[rows, length, d]` to
            the tokens that are needed, `[rows, tokens, d]`. Returns what the module returns, for these tokens.
    """

    path: str
    call: Callable[..., tuple[jax.Array]]


@dataclass(frozen=True)
class FeedForward:
    """The module that applies the activation between the two feed-forward layers.

    Attributes:
        path: its path, with `{number}` for the layer's index, counted from 0.
        call: `(module, activation, *args, **kwargs)`, called instead of the module with the arguments of its call. Returns what the
            module returns, with this activation.
        activation: the config's name for the activation.
    """

    path: str
    call: Callable[..., jax.Array]
    activation: str


@dataclass(frozen=True)
class Projections:
    """The linear layers of one encoder layer, by their paths with `{number}` for the layer's index, counted from 0.

    The queries, keys and values must be used channel by channel: a query's channel meets only the same channel of a key, and a
    value's channel reaches only the same channel of `attention_output`. Rotary positions, which mix channels, do not fit.

    Attributes:
        query: the projection of the queries.
        key: the projection of the keys.
        value: the projection of the values.
        attention_output: the layer that reads what attention makes of the values.
        intermediate: the first feed-forward layer.
        output: the second feed-forward layer.
        activation: the config's name for the activation between the two.
    """

    query: str
    key: str
    value: str
    attention_output: str
    intermediate: str
    output: str
    activation: str


@dataclass(frozen=True)
class Family:
    """An encoder architecture.

    Attributes:
        model_type: transformers' name of the architecture.
        default_targets: role → layers that play it.
        word_embeddings: name of the word embeddings. Prompt tuning works there, and masked-LM decoders are tied to it.
        norms: regular expression for the dotted names of all layer norms. PEFT's files need it: PEFT has no keyword for all.
        classifier_heads: names of the modules above the encoder that a classifier trains; a name counts as an ending, as
            in PEFT.
        dropout_rates: the config's names of its dropout rates: the encoder's and the classifier's.
        base_prefix: path of the encoder below the heads, if it is not transformers' `base_model_prefix`.
        positions_after_padding: True if positions start after the padding index and padding itself has that index, as in
            RoBERTa. False if they start at 0.
        attention: how to compute its attention here.
        after_attention: path of the module that reads the last layer's attention, with `{last}` for the layer's index.
            Tokens no longer interact from there on.
        last_layer: how to compute the last layer's queries for only some tokens.
        feed_forward: where its activation is applied.
        projections: the linear layers of its encoder layers, for sparsity that is chosen by the batch.
        citation: its paper, for model cards.
    """

    model_type: str
    default_targets: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    word_embeddings: str | None = None
    norms: str | None = None
    classifier_heads: tuple[str, ...] | None = None
    dropout_rates: tuple[str, ...] | None = None
    base_prefix: str | None = None
    positions_after_padding: bool = False
    attention: Attention | None = None
    after_attention: str | None = None
    last_layer: LastLayer | None = None
    feed_forward: FeedForward | None = None
    projections: Projections | None = None
    citation: str | None = None


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """Reshape `[rows, length, d]` to `[rows, length, heads, d / heads]`."""
    return x.reshape(*x.shape[:2], num_heads, -1)
