"""DoRA: W = m ⊙ (W₀ + s·A·B) / ‖W₀ + s·A·B‖, column by column (Liu et al. 2024, arXiv 2402.09353, equation 5).

LoRA learns the direction of every output's weights, and `m: [d_out]` their length. As in section 4.3 of the paper, no gradient
flows through the norm. The norm is computed without a `[d_in, d_out]` product:

    ‖W₀ + s·A·B‖² = ‖W₀‖² + 2s·⟨W₀, A·B⟩ + s²·‖A·B‖² = Σ W₀² + 2s·Σ (AᵀW₀) ⊙ B + s²·Σ (AᵀA·B) ⊙ B
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Description, FrozenLayer, SiteParams
from jaxpeft.adapters.products import product

DESCRIPTION = Description(
    title="DoRA",
    equation="W = m ⊙ (W₀ + s·AB) / ‖W₀ + s·AB‖",
    source="Liu et al. 2024, arXiv 2402.09353",
    advice="if LoRA at a low rank is not good enough, and a slower step is acceptable",
    peft="`LORA`, `use_dora`",
)
"""DoRA is LoRA's option `use_dora`, with a name of its own in reports."""


def at_magnitude(kernel: jax.Array, m: jax.Array) -> jax.Array:
    """`kernel: [d_in, d_out]` with its columns scaled to the lengths `m: [d_out]`; no gradient flows through the norm."""
    return kernel * (m / jax.lax.stop_gradient(jnp.linalg.norm(kernel, axis=0)))


def column_norms(frozen_kernel: jax.Array, params: SiteParams, scaling: float) -> jax.Array:
    """‖W₀ + s·A·B‖ of every column, fp32 `[d_out]`, from thin products only."""
    kernel, a, b = frozen_kernel, params["a"], params["b"]
    with jax.default_matmul_precision("highest"):  # thin products: an accelerator's bf16 would save nothing here
        cross = ((a.T @ kernel) * b).sum(0)
        low_rank = ((a.T @ a @ b) * b).sum(0)
    squares = jnp.square(kernel).sum(0)
    return jnp.sqrt(squares + 2 * scaling * cross + scaling**2 * low_rank)


def forward(
    x: jax.Array, dropped: jax.Array | None, delta: jax.Array, params: SiteParams, scaling: float, layer: FrozenLayer
) -> jax.Array:
    """y + (m/n − 1)·(x_d·W₀) + (m/n)·s·x_d·A·B: the bias is never rescaled.

    Args:
        x: the layer's input.
        dropped: x after dropout, None without dropout. With it W₀ is multiplied twice, as in PEFT.
        delta: s·x_d·A·B, `[..., d_out]`.
        params: `a`, `b` and `m`.
        scaling: s.
        layer: the frozen layer.
    """
    # From the fp32 weights in a bf16 model too: m was taken from them, and a new adapter must be a no-op.
    norms = jax.lax.stop_gradient(column_norms(layer.weights(jnp.float32), params, scaling))
    ratio = params["m"] / norms
    if dropped is not None:
        base, plain = layer.base(x), product(dropped, layer.kernel())
    else:
        base = layer.base(x)
        plain = base if layer.bias is None else base - layer.bias.astype(layer.dtype)
    # Subtract 1 in fp32: m/n is close to 1, and in bf16 the difference would lose its digits.
    return base + (ratio - 1).astype(layer.dtype) * plain + ratio.astype(layer.dtype) * delta
