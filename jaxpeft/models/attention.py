"""Self-attention in the place of an encoder's own: over several texts in a row, each by itself, and flash attention.

The encoders of transformers know a mask of tokens, no blocks, and compute every score in memory. Where one of the two is
wanted, `module_overrides` gives what `jaxpeft.inject.apply` calls instead of their attention modules: projections, and with them
adapters and quantised kernels, stay the module's own; the scores are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.errors import InputError
from jaxpeft.models.build import Model

# Where the attention modules are, by architecture.
_PATHS = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "roberta-prelayernorm", "electra"), "encoder/layer/{number}/attention/self"
    ),
    "distilbert": "transformer/layer/{number}/attention",
}

FLASH_MIN_LENGTH: dict[str, int] = {"cudnn": 512, "tpu": 1024}
"""Tokens from which `auto` takes flash attention; reckoned, not yet measured.

The scores of dense attention go through memory about six times in a forward pass, 2 bytes each. At BERT-base's sizes on an H200
(4.8 TB/s, 600 TFLOP/s) that takes about 60 % of the time of a layer's matrix products at 512 tokens, BERT's limit, and 15 % at 128.
On a TPU the kernel keeps two fp32 sums a token and head for its backward pass in 128 lanes each, at 512 tokens as much as the scores:
compiled for v5e, a training step of two layers moves 8 % fewer bytes with it and needs 25 % more room.
"""

_TPU_BLOCK = 128  # the kernel's tiles; a row is filled up to them

Scores = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""`(query, key, value, segments) → values`: `[rows, length, heads, width]` each, `segments: [rows, length]` int32.

A token sees the tokens of its own segment; 0 is padding, where the answer is finite and means nothing."""


@dataclass(frozen=True)
class Flash:
    """Flash attention on the devices of a run.

    Attributes:
        kernel: cuDNN's, or the Pallas kernel for TPUs; neither drops out any of the attention's weights.
        min_length: rows of fewer tokens are left to dense attention.
        over_devices: makes a function of arrays that are split by rows one that each device runs on its own part.
    """

    kernel: Literal["cudnn", "tpu"]
    min_length: int = 0
    over_devices: Callable[[Scores], Scores] = lambda scores: scores

    def scores(self, *, packed: bool) -> Scores:
        """The kernel for rows that hold several texts each (`packed`), or one, followed by padding."""
        if self.kernel == "tpu":
            return self.over_devices(_tpu)
        return self.over_devices(_cudnn_packed if packed else _cudnn)


def choose_flash(
    asked: Literal["auto", "dense", "flash"], model: Model, device: Any, over_devices: Callable[[Scores], Scores]
) -> Flash | None:
    """The flash attention that `model` is trained and judged with on devices such as `device`; None: its own, dense.

    `auto` takes it where it can be had and for rows long enough to pay; and in training, where no attention weights are dropped.

    Raises:
        InputError: for "flash" where it cannot be.
    """
    kernel, dtype = _kernel(device), jnp.dtype(model.module.dtype).name
    if asked == "auto":
        possible = kernel and dtype == "bfloat16" and model.model_type in _PATHS
        return Flash(kernel, FLASH_MIN_LENGTH[kernel], over_devices) if possible and kernel else None
    if asked == "dense":
        return None
    _check_known(model, "model.attention 'flash'")
    if kernel is None:
        raise InputError(
            f"model.attention 'flash' needs a TPU, or an NVIDIA GPU of compute capability 8.0 or above, and this is a {device.platform}; "
            "set it to auto"
        )
    if dtype != "bfloat16":
        raise InputError(f"model.attention 'flash' computes in bfloat16, and model.dtype is {dtype}; set one of them")
    if rate := attention_dropout(model):
        raise InputError(
            f"model.attention 'flash' drops out no attention weights, and this model's rate in training is {rate:g}; "
            "give --model.dropout 0, or set model.attention to auto"
        )
    return Flash(kernel, 0, over_devices)


def attention_dropout(model: Model) -> float:
    """The rate at which the weights of `model`'s attention are dropped in training."""
    config = model.module.config
    return getattr(
        config, "attention_dropout" if model.model_type == "distilbert" else "attention_probs_dropout_prob", 0.0
    )


def check_packing(model: Model) -> None:
    """Raise InputError for a model whose rows cannot hold several texts."""
    _check_known(model, "data.packing")
    if getattr(model.config, "sinusoidal_pos_embds", False):
        raise InputError("data.packing needs position embeddings, and this DistilBERT computes sines; set it to false")


def module_overrides(
    model: Model, flash: Flash | None, *, packed: bool, training: bool
) -> dict[str, Callable[..., Any]]:
    """What to call instead of `model`'s attention modules, by path.

    The attention mask that the module is given must be segments: 0 for padding, and where rows are `packed`, a number for
    each text.

    Args:
        model: an architecture that is known here.
        flash: what computes the scores; None: dense, with the dropout of the model's configuration.
        packed: whether rows hold several texts.
        training: whether there is dropout.
    """
    prefix, path = model.base_prefix, _PATHS[model.model_type]
    scores = flash.scores(packed=packed) if flash else None
    call = _distilbert if model.model_type == "distilbert" else _bert
    rate = attention_dropout(model) if training else 0.0

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[jax.Array]:
        return call(module, scores or _dense_of(module, rate), *args, **kwargs)

    return {f"{prefix}/{path.format(number=number)}": attend for number in range(model.config.num_hidden_layers)}


def position_taps(model: Model, position_ids: jax.Array) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Taps that give `position_ids: [rows, length]` to a model that counts positions itself; {} where it takes them."""
    if model.model_type != "distilbert":
        return {}
    return {f"{model.base_prefix}/embeddings/position_embeddings": lambda counted: position_ids}


def _check_known(model: Model, flag: str) -> None:
    if model.model_type not in _PATHS:
        raise InputError(f"{flag}: the attention of '{model.model_type}' is not known ({', '.join(_PATHS)} are)")


def _kernel(device: Any) -> Literal["cudnn", "tpu"] | None:
    if device.platform == "tpu":
        return "tpu"
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    return "cudnn" if device.platform == "gpu" and major.isdigit() and int(major) >= 8 else None


def _bert(module: Any, scores: Scores, x: jax.Array, segments: jax.Array, *_: Any, **options: Any) -> tuple[jax.Array]:
    """BERT's self-attention, and that of its kin, which copied it: `x: [rows, length, d]`."""
    assert all(options.get(name) is None for name in ("layer_head_mask", "key_value_states"))
    heads = module.config.num_attention_heads
    query, key, value = (_split(layer(x), heads) for layer in (module.query, module.key, module.value))
    return (scores(query, key, value, segments).reshape(x.shape),)


def _distilbert(
    module: Any, scores: Scores, *, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, **_: Any
) -> tuple[jax.Array]:
    """DistilBERT's, which has its output projection inside."""
    layers, heads = ((module.q_lin, query), (module.k_lin, key), (module.v_lin, value)), module.n_heads
    q, k, v = (_split(layer(x), heads) for layer, x in layers)
    return (module.out_lin(scores(q, k, v, mask).reshape(query.shape)),)


def _split(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


def _dense_of(module: nn.Module, rate: float) -> Scores:
    """Dense attention with the dropout of `module`'s own: one mask of weights for all of BERT's rows and heads, as there."""
    if not rate:
        return _dense
    return partial(
        _dense,
        dropout_rng=module.make_rng("dropout"),
        dropout_rate=rate,
        broadcast_dropout=not hasattr(module, "q_lin"),
        deterministic=False,
    )


def _dense(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, **dropout: Any) -> jax.Array:
    options = {"deterministic": True, **dropout}
    weights = nn.dot_product_attention_weights(query, key, mask=_same(segments), dtype=query.dtype, **options)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def _same(segments: jax.Array) -> jax.Array:
    """`[rows, 1, length, length]` bool: which tokens belong to one text."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, implementation: Any = "cudnn"
) -> jax.Array:
    # Lengths, not a mask, which would be written out for every pair of tokens. Padding is at the end of a row.
    lengths = (segments > 0).sum(-1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )


def _cudnn_packed(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, implementation: Any = "cudnn"
) -> jax.Array:
    length = query.shape[1]
    query, key, value, segments = (
        _filled(x, 2) for x in (query, key, value, segments)
    )  # the kernel's backward pass wants it even
    out = jax.nn.dot_product_attention(query, key, value, mask=_same(segments), implementation=implementation)
    return out[:, :length]


def _tpu(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    length = query.shape[1]
    query, key, value, segments = (_filled(x, _TPU_BLOCK) for x in (query, key, value, segments))
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    out = flash_attention(
        query, key, value, segment_ids=SegmentIds(segments, segments), sm_scale=1 / math.sqrt(query.shape[-1])
    )
    return out.swapaxes(1, 2)[:, :length]


def _filled(x: jax.Array, multiple: int) -> jax.Array:
    """`x: [rows, length, …]` with zeros behind its rows, up to a `multiple` of tokens."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) if missing else x
