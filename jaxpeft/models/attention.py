"""Self-attention computed here instead of by the encoder: flash attention, rows that hold several texts, and CPUs.

The encoders of transformers mask tokens, not blocks of tokens, hold every score in memory, and transpose more than they need.
`module_overrides` returns the functions that `jaxpeft.inject.apply` calls instead of their attention modules. The projections stay
the module's own, and so do their adapters and quantised kernels; only the scores are computed here. The model's family
(`jaxpeft.families`) says how its modules are called.
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

from jaxpeft.errors import InputError, check_choice
from jaxpeft.families import required
from jaxpeft.families.base import Attention
from jaxpeft.inject import RowKey
from jaxpeft.models.build import Model
from jaxpeft.models.dense_attention import attend as dense_attention
from jaxpeft.trees import below

FLASH_MIN_LENGTH: dict[str, int] = {"cudnn": 512, "tpu": 1024}
"""Row length in tokens from which `auto` chooses flash attention. Calculated, not yet measured.

Dense attention moves its scores through memory about six times in a forward pass, 2 bytes each. At BERT-base's sizes on an H200
(4.8 TB/s, 600 TFLOP/s) this takes about 60 % of the time of a layer's matrix products at 512 tokens, BERT's limit, and 15 % at
128. On a TPU the kernel keeps two fp32 sums per token and head for its backward pass, in 128 lanes each. At 512 tokens that is as
much memory as the scores. Compiled for v5e, a training step of two layers moves 8 % fewer bytes with the kernel and needs 25 %
more memory.
"""

_TPU_BLOCK = 128  # The kernel works on tiles of this many tokens, so rows are padded to a multiple of it.

Scores = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""`(query, key, value, segments) → values`: `[rows, length, heads, width]` each, `segments: [rows, length]` int32.

A token sees the tokens of its own segment. Segment 0 is padding: its values are finite and mean nothing. If a row holds one text,
there may be queries of only some of its tokens."""


@dataclass(frozen=True)
class Flash:
    """Flash attention on the devices of a run.

    Attributes:
        kernel: cuDNN's kernel, or the Pallas kernel for TPUs. Neither has dropout of attention weights.
        min_length: shorter rows use dense attention, in tokens.
        over_devices: wraps a function of arrays that are sharded by rows, so that each device runs it on its own rows.
    """

    kernel: Literal["cudnn", "tpu"]
    min_length: int = 0
    over_devices: Callable[[Scores], Scores] = lambda scores: scores

    def scores(self, *, packed: bool) -> Scores:
        """Return the kernel. If `packed`, a row holds several texts; otherwise it holds one, followed by padding."""
        if self.kernel == "tpu":
            return self.over_devices(_tpu)
        return self.over_devices(_cudnn_packed if packed else _cudnn)


def choose_flash(
    asked: Literal["auto", "dense", "flash"], model: Model, device: Any, over_devices: Callable[[Scores], Scores]
) -> Flash | None:
    """Return the flash attention for training and evaluating `model` on devices like `device`; None for the model's own.

    `auto` chooses it if the device, the dtype and the family allow it, for rows of at least `FLASH_MIN_LENGTH` tokens. Training
    uses it only if no attention weights are dropped.

    Raises:
        InputError: for "flash" if the device, the dtype, the family or the dropout rate does not allow it.
    """
    check_choice("model.attention", asked, ("auto", "dense", "flash"))
    kernel, dtype = _kernel(device), jnp.dtype(model.module.dtype).name
    if asked == "auto":
        possible = dtype == "bfloat16" and model.family.attention
        return Flash(kernel, FLASH_MIN_LENGTH[kernel], over_devices) if possible and kernel else None
    if asked == "dense":
        return None
    _attention_of(model, "model.attention 'flash'")
    if kernel is None:
        raise InputError(
            "model.attention 'flash' needs a TPU, or an NVIDIA GPU of compute capability 8.0 or above, and this is a "
            f"{device.platform}; set it to auto"
        )
    if dtype != "bfloat16":
        raise InputError(f"model.attention 'flash' computes in bfloat16, and model.dtype is {dtype}; set one of them")
    if rate := attention_dropout(model):
        raise InputError(
            "model.attention 'flash' has no dropout of attention weights, and this model's rate in training is "
            f"{rate:g}; give --model.dropout 0, or set model.attention to auto"
        )
    return Flash(kernel, 0, over_devices)


def attention_dropout(model: Model) -> float:
    """Return the rate, 0 to 1, at which `model` drops attention weights in training.

    Raises:
        InputError: if the attention of the model's family is not known.
    """
    return getattr(model.module.config, _attention_of(model, "the dropout of attention").dropout_rate)


def check_packing(model: Model) -> None:
    """Raise InputError for a model whose rows cannot hold several texts."""
    if obstacle := _attention_of(model, "data.packing").packing_obstacle(model.config):
        raise InputError(f"data.packing {obstacle}; set it to false")


def module_overrides(
    model: Model,
    flash: Flash | None,
    *,
    packed: bool,
    training: bool,
    row_key: RowKey | None = None,
    parts: int = 1,
) -> dict[str, Callable[..., Any]]:
    """Return path → the function to call instead of the attention module there.

    The attention mask that the model is given must hold segments: 0 for padding, 1 for a token, or if rows are `packed`, another
    number for each text.

    Args:
        model: a model whose family says how its attention is called.
        flash: the kernel for the scores; None computes them densely, with the dropout of the model's configuration.
        packed: True if rows hold several texts.
        training: True if there is dropout.
        row_key: as in `jaxpeft.inject.apply`.
        parts: parts of the heads that dense attention computes side by side (`jaxpeft.models.dense_attention`).

    Raises:
        InputError: if the attention of the model's family is not known.
    """
    attention = _attention_of(model, "attention outside the model")
    scores = flash.scores(packed=packed) if flash else None
    rate = attention_dropout(model) if training else 0.0

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[jax.Array]:
        drops = getattr(module, attention.dropout_module) if attention.dropout_module else module
        dense = partial(_dense, visible=_same if packed else _real, parts=parts)
        chosen = scores or _with_dropout(dense, drops, rate, row_key, broadcast=attention.broadcast_dropout)
        return attention.attend(module, chosen, *args, **kwargs)

    layers = range(model.config.num_hidden_layers)
    return {below(model.base_prefix, attention.path.format(number=number)): attend for number in layers}


def takes_positions(model: Model) -> bool:
    """Return True if `model` can be given the position of each token: its family says how, and it has position embeddings."""
    attention = model.family.attention
    return attention is not None and attention.packing_obstacle(model.config) is None


def position_taps(model: Model, position_ids: jax.Array) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Return input hooks that give `position_ids: [rows, length]` to a model that counts positions itself; {} for others.

    Raises:
        InputError: if the attention of the model's family is not known.
    """
    path = _attention_of(model, "data.packing").position_module
    return {below(model.base_prefix, path): lambda counted: position_ids} if path else {}


def _attention_of(model: Model, needed_by: str) -> Attention:
    return required(model.family, "attention", needed_by)


def _kernel(device: Any) -> Literal["cudnn", "tpu"] | None:
    if device.platform == "tpu":
        return "tpu"
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    return "cudnn" if device.platform == "gpu" and major.isdigit() and int(major) >= 8 else None


def _real(segments: jax.Array) -> jax.Array:
    """Return bool `[rows, 1, 1, length]`: True if a token is not padding."""
    return (segments > 0)[:, None, None]


def _same(segments: jax.Array) -> jax.Array:
    """Return bool `[rows, 1, length, length]`: True if both tokens belong to the same text."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]


def _with_dropout(
    dense: Callable[..., jax.Array], module: nn.Module, rate: float, row_key: RowKey | None, *, broadcast: bool
) -> Scores:
    """Return `dense` with the dropout that `module` draws; `broadcast` draws one mask for all rows and heads."""
    if not rate:
        return dense
    key = module.make_rng("dropout")
    if row_key and not broadcast:
        key = row_key(key)
    return partial(dense, rate=rate, rng=key, broadcast=broadcast)


def _dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    *,
    visible: Callable[[jax.Array], jax.Array] = _same,
    rate: float = 0.0,
    rng: jax.Array | None = None,
    broadcast: bool = False,
    parts: int = 1,
) -> jax.Array:
    """Dense attention. `visible` makes from the segments the mask of the scores."""
    kept = None
    if rng is not None:
        heads = (1, 1) if broadcast else (query.shape[0], query.shape[2])
        drawn = jax.random.bernoulli(rng, 1.0 - rate, (*heads, query.shape[1], key.shape[1]))
        kept = drawn.astype(query.dtype) / jnp.asarray(1.0 - rate, query.dtype)
    return dense_attention(query, key, value, visible(segments), kept, parts=parts)


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, implementation: Any = "cudnn"
) -> jax.Array:
    # Padding is at the end of a row, so lengths say it all. A mask would be stored for every pair of tokens.
    lengths = (segments > 0).sum(-1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )


def _cudnn_packed(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, *, implementation: Any = "cudnn"
) -> jax.Array:
    length = query.shape[1]
    # The kernel's backward pass needs an even length.
    query, key, value, segments = (_filled(x, 2) for x in (query, key, value, segments))
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
    """Pad the rows of `x: [rows, length, …]` with zeros to a `multiple` of tokens."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2))) if missing else x
