"""LoRA from the frozen kernel W `[d_in, d_out]`: PiSSA, OLoRA, LoftQ. Decompositions are numpy's, on the host, in fp32.

    PiSSA   W = U·S·V;   A = U_r·√(S_r/s),  B = √(S_r/s)·V_r;  W becomes W − s·A·B       Meng et al. 2024, arXiv 2404.02948, eq. 2-4
    OLoRA   Wᵀ = Q·R;    A = R_rᵀ,  B = Q_rᵀ;                  W becomes W − s·A·B       Büyükakyüz 2024, arXiv 2406.01775, section 3
    LoftQ   T times  Q = quantised(W − A·B);  A·B = the first r of SVD(W − Q);  W becomes Q      Li et al. 2023, arXiv 2310.08659, alg. 1

As in PEFT: OLoRA keeps the rows of R and columns of Q in the order of W's columns and does not sort them by size. LoftQ ignores s.
So a new adapter restores W only if s = 1, and only up to the part of the quantisation error that a matrix of rank r cannot represent.
Its Q is stored in full precision. In 8 bits W − A·B is first rounded to fp16, because bitsandbytes' `Int8Params` does so.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import SiteParams
from jaxpeft.errors import InputError
from jaxpeft.quantization import dequantize, quantize


def pissa(rng: jax.Array, kernel: np.ndarray, rank: int, scaling: float, rounds: int | None) -> SiteParams:
    """The principal part of `kernel: [d_in, d_out]`; with `rounds` from a randomised SVD of so many power iterations.

    Raises:
        InputError: if the scaling is not positive.
    """
    if scaling <= 0:
        raise InputError(f"PiSSA divides by adapter.alpha / rank, which is {scaling:g}; give a positive alpha")
    if rounds is None:
        u, s, vh = np.linalg.svd(kernel, full_matrices=False)
    else:
        sketch = np.asarray(jax.random.normal(rng, (min(kernel.shape), rank)))
        u, s, vh = randomized_svd(kernel, sketch, rounds)
    return _split(u, s / np.float32(scaling), vh, rank)


def olora(kernel: np.ndarray, rank: int) -> SiteParams:
    """B: the first `rank` orthonormal directions of the outputs. A: the coordinates of W in them."""
    q, r = np.linalg.qr(kernel.T)
    return {"a": jnp.asarray(r[:rank].T), "b": jnp.asarray(q[:, :rank].T)}


def loftq(kernel: np.ndarray, rank: int, options: dict[str, Any]) -> tuple[np.ndarray, SiteParams]:
    """The quantised kernel Q `[d_in, d_out]`, in fp32, and the adapter that goes with it."""
    left = kernel
    for _ in range(options["loftq_iter"]):
        quantized = _rounded(left, options["loftq_bits"])
        u, s, vh = np.linalg.svd(kernel - quantized, full_matrices=False)
        params = _split(u, s, vh, rank)
        left = kernel - np.asarray(params["a"]) @ np.asarray(params["b"])
    return quantized, params


def randomized_svd(matrix: np.ndarray, sketch: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Approximately the first k singular vectors and values of `matrix`, by the algorithm of torch's `svd_lowrank`.

    Halko, Martinsson & Tropp 2009 (arXiv 0909.4061), algorithms 4.4 and 5.1.

    Args:
        matrix: `[m, n]`.
        sketch: the random matrix of the first product: `[min(m, n), k]`, drawn from N(0, 1).
        rounds: power iterations. The error falls with (a dropped singular value / a kept one)^(2·rounds + 1).

    Returns:
        `u: [m, k]`, `s: [k]`, `vh: [k, n]`.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    basis = np.linalg.qr(tall @ sketch)[0]
    for _ in range(rounds):
        basis = np.linalg.qr(tall.T @ basis)[0]
        basis = np.linalg.qr(tall @ basis)[0]
    u, s, vh = np.linalg.svd(basis.T @ tall, full_matrices=False)
    u = basis @ u
    return (vh.T, s, u.T) if wide else (u, s, vh)


def _split(u: np.ndarray, s: np.ndarray, vh: np.ndarray, rank: int) -> SiteParams:
    """A = U·√S and B = √S·V, from the first `rank` singular vectors."""
    root = np.sqrt(s[:rank])
    return {"a": jnp.asarray(u[:, :rank] * root), "b": jnp.asarray(root[:, None] * vh[:rank])}


def _rounded(kernel: np.ndarray, bits: int) -> np.ndarray:
    """`kernel` quantised and dequantised to fp32: NF4 in blocks of 64 for 4 bits, int8 with a scale per output for 8."""
    if bits == 4:
        stored = quantize(kernel, data_type="nf4", block_size=64, double_quantization=False)
    else:
        stored = quantize(kernel.astype(np.float16), data_type="int8")
    return np.asarray(dequantize(stored))
