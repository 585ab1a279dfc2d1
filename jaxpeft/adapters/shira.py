"""Sparse updates at fixed entries: W = W₀ + S. SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175, section 4) and Super-Tuning
(arXiv 2607.09287).

Only the values at the chosen entries are parameters, `v: [n]` in fp32; gradients and optimizer state are as small. The entries are
constants of the layer, `indices: [n]` int32 (`sparse_indices.py`), unless a schedule redraws them in training. As in PEFT:

- SHiRA has r·(d_in + d_out) entries, as many as LoRA of rank r, random ones by default.
- Super-Tuning has a share 1 − sparsity of the entries, those with the largest |W₀|. With `rank`, a LoRA trains beside them ("Supra").

In PEFT only random entries are a SHiRA of its own; the others are what its users give as `mask_fn`. The papers' scale s is 1 here,
as in PEFT's files: multiply the values to scale the update.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import Description, FrozenLayer, HasConstants, Site, SiteParams, Statistics, dropout, drops
from jaxpeft.adapters.low_rank import kaiming
from jaxpeft.adapters.products import product
from jaxpeft.adapters.sparse_indices import check_indices, choose_indices, flat, largest, places, redraw
from jaxpeft.errors import InputError


class SparseDelta(HasConstants):
    """The common part of SHiRA and Super-Tuning: W₀ + S with the values `v: [n]` at the flat `indices: [n]`."""

    constants: ClassVar[tuple[str, ...]] = ("indices",)
    redrawn: ClassVar[tuple[str, ...]] = ("indices",)
    default_role: ClassVar[str | None] = "attention_qv"

    @abstractmethod
    def num_entries(self, site: Site) -> int:
        """How many entries of `site`'s kernel train.

        Raises:
            InputError: if that is no number from 1 to all of them.
        """

    def check_constants(self, site: Site, constants: SiteParams) -> None:
        """Raise InputError if an index is outside the kernel or is there twice."""
        check_indices(constants["indices"], site.d_in * site.d_out, f"the adapter of layer {site.path}")

    def constant_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """`indices: [n]`."""
        return {"indices": (self.num_entries(site),)}

    def redraw(
        self, params: SiteParams, constants: SiteParams, scores: jax.Array, share: float | jax.Array | np.float32
    ) -> tuple[SiteParams, SiteParams, SiteParams]:
        """A layer's entries after a redraw (`sparse_indices.redraw`). Pure; `share` may be traced.

        Args:
            params: the layer's parameters.
            constants: its `indices: [n]`.
            scores: of all entries of the kernel, `[d_in, d_out]`, finite. The highest of those that are free are taken up.
            share: the share of the n entries to give up, those with the smallest |v|, from 0 to 1. Their number is rounded down.

        Returns:
            the parameters, the constants, and bool like the parameters: True where the optimizer's moments start anew.
        """
        number = jnp.floor(share * params["v"].size).astype(jnp.int32)
        indices, values, kept = redraw(constants["indices"], params["v"], flat(scores), number)
        fresh = {name: ~kept if name == "v" else jnp.zeros(leaf.shape, bool) for name, leaf in params.items()}
        return {**params, "v": values}, {**constants, "indices": indices}, fresh

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + S."""
        rows, columns = places(params["indices"], frozen_kernel.shape[0])
        return with_entries(frozen_kernel, params["v"], rows, columns)

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """One product with W₀ + S; in bf16 x·W₀ + x·S, because small values would be rounded away beside W₀."""
        x, kernel = layer.cast(x), layer.kernel()
        rows, columns = places(params["indices"], kernel.shape[0])
        if jnp.finfo(layer.dtype).bits < 32:
            return layer.base(x) + sparse_product(x, jnp.zeros_like(kernel), params["v"], rows, columns)
        return layer.plus_bias(sparse_product(x, kernel, params["v"], rows, columns))


@dataclass(frozen=True)
class Shira(SparseDelta):
    """Sparse high-rank adaptation: r·(d_in + d_out) entries.

    `mask_type` says how they are chosen (`sparse_indices.Choice`); a file may have any other name for entries that it holds.
    `random_seed` draws random entries apart from the run's seed. `block_size` is for "block".
    """

    name: ClassVar[str] = "shira"
    description: ClassVar[Description] = Description(
        title="SHiRA",
        equation="W = W₀ + S, S non-zero at r·(d_in + d_out) entries",
        source="Bhardwaj et al. 2024, arXiv 2406.13175",
        advice="if adapters are switched or added up: few weights change",
        peft="`SHIRA`",
    )
    rank: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    block_size: int = 8
    init_weights: bool = True

    def __post_init__(self) -> None:
        _check_start(self.init_weights)
        if self.block_size < 1:
            raise InputError(f"adapter.block_size {self.block_size} must be at least 1")

    @property
    def statistics(self) -> Statistics | None:
        """The gradients of the kernels, if they choose the entries."""
        return "gradients" if self.mask_type == "gradient" else None

    @classmethod
    def depends_on_seed(cls, options: Mapping[str, Any]) -> bool:
        """True for random entries without a seed of their own, and for those that the run's first batches choose."""
        choice = options.get("mask_type") or cls.mask_type
        return choice == "gradient" or (choice == "random" and options.get("random_seed") is None)

    def num_entries(self, site: Site) -> int:
        """r·(d_in + d_out).

        Raises:
            InputError: if the kernel has fewer entries.
        """
        number, size = self.rank * (site.d_in + site.d_out), site.d_in * site.d_out
        if number > size:
            raise InputError(
                f"adapter.rank {self.rank} asks for {number} entries, and layer {site.path} has {size} "
                f"({site.d_in} to {site.d_out}); give a rank of at most {size // (site.d_in + site.d_out)}"
            )
        return number

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`v` = 0. Without `init_weights` ~ N(0, 1), for tests."""
        return {"v": _initial_values(rng, self.num_entries(site), self.init_weights)}

    def init_constants(
        self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array], statistics: jax.Array | None = None
    ) -> SiteParams:
        """`indices`, ascending."""
        if self.random_seed is not None:
            rng = jax.random.fold_in(jax.random.key(self.random_seed), zlib.crc32(site.path.encode()))
        found = choose_indices(
            self.mask_type,
            self.num_entries(site),
            site,
            rng=rng,
            kernel=kernel,
            gradient=statistics,
            block_size=self.block_size,
        )
        return {"indices": found}


@dataclass(frozen=True)
class SuperTuning(SparseDelta):
    """A share 1 − `sparsity` of the entries trains: those with the largest |W₀|, or without `select_top` the smallest.

    With `rank` a LoRA trains beside them: y = x·(W₀ + S) + alpha/rank·dropout(x)·A·B. `alpha` is 2·rank by default. If
    `save_precomputed_indices` is false, a file lacks the indices, and every load finds them again in the base's weights.
    """

    name: ClassVar[str] = "supertuning"
    description: ClassVar[Description] = Description(
        title="Super-Tuning",
        equation="W = W₀ + S (+ s·AB), S non-zero at the largest weights",
        source="arXiv 2607.09287",
        advice="a sparse update without a choice to make; with LoRA beside it: Supra",
        peft="`SUPERTUNING`",
    )
    sparsity: float = 0.99
    select_top: bool = True
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and an alpha without a rank, as PEFT does."""
        if not 0 <= self.sparsity < 1:
            raise InputError(f"adapter.sparsity is {self.sparsity}; it must be at least 0 and below 1")
        _check_start(self.init_weights)
        if self.rank is None and self.alpha is not None:
            raise InputError(
                f"adapter.alpha {self.alpha:g} scales the LoRA beside the sparse values: set adapter.rank too, or alpha to null"
            )

    @property
    def scaling(self) -> float:
        """The factor s on A·B; 0 without a LoRA."""
        if self.rank is None:
            return 0.0
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def uses_rng(self) -> bool:
        """True if the LoRA's input is dropped out."""
        return self.rank is not None and drops(self.dropout)

    @property
    def saves_constants(self) -> bool:
        """True if a file holds the indices."""
        return self.save_precomputed_indices

    @classmethod
    def depends_on_seed(cls, options: Mapping[str, Any]) -> bool:
        """False: the base's weights choose the entries."""
        return False

    def num_entries(self, site: Site) -> int:
        """The share 1 − sparsity of the entries, rounded down as in PEFT.

        Raises:
            InputError: if nothing is left to train.
        """
        number = int(site.d_in * site.d_out * (1 - self.sparsity))
        if number < 1:
            raise InputError(
                f"adapter.sparsity {self.sparsity} leaves no entry of layer {site.path} ({site.d_in} to {site.d_out}) to train; lower it"
            )
        return number

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`v` = 0; with a LoRA also `a: [d_in, rank]` uniform, and `b: [rank, d_out]` = 0.

        Without `init_weights` v ~ N(0, 1) and B is uniform, for tests.
        """
        of_values, of_a, of_b = jax.random.split(rng, 3)
        values = {"v": _initial_values(of_values, self.num_entries(site), self.init_weights)}
        if self.rank is None:
            return values
        zero = jnp.zeros((self.rank, site.d_out), jnp.float32)
        b = zero if self.init_weights else kaiming(of_b, zero.shape, self.rank)
        return {**values, "a": kaiming(of_a, (site.d_in, self.rank), site.d_in), "b": b}

    def init_constants(
        self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array], statistics: jax.Array | None = None
    ) -> SiteParams:
        """`indices` in the order of |W₀|, the chosen end first: the order of PEFT's files without indices."""
        scores = flat(jnp.abs(kernel()))
        return {"indices": largest(scores if self.select_top else -scores, self.num_entries(site))}

    def check_remade(self, site: Site, kernel: jax.Array, constants: SiteParams) -> None:
        """Raise InputError if `kernel` does not determine the indices, because chosen entries have equal |W₀|.

        torch orders equal ones as it likes, so a file without indices would put values in the wrong places.
        """
        magnitudes = np.asarray(flat(jnp.abs(kernel)))
        chosen = magnitudes[np.asarray(constants["indices"])]
        last = chosen.min() if self.select_top else chosen.max()
        if np.unique(chosen).size < chosen.size or (magnitudes == last).sum() > 1:
            raise InputError(
                f"save_precomputed_indices false: layer {site.path} has chosen entries of equal |W₀|, so its weights do not say "
                "which value belongs to which entry; save the adapter with save_precomputed_indices true"
            )

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + S, and s·A·B with a LoRA."""
        kernel = super().kernel(frozen_kernel, params)
        return kernel if self.rank is None else kernel + self.scaling * (params["a"] @ params["b"])

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """The product with W₀ + S, and the LoRA's side path. Dropout is on the side path only."""
        y = super().forward(x, params, layer, rng)
        if self.rank is None:
            return y
        h = layer.times(dropout(layer.cast(x), self.dropout, rng), params["a"])
        return y + jnp.asarray(self.scaling, layer.dtype) * (product(h, params["b"].astype(layer.dtype)))


def with_entries(kernel: jax.Array, values: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`kernel: [d_in, d_out]` with `values: [n]` added at its entries `[rows, columns]`, all different."""
    return kernel.at[rows, columns].add(values.astype(kernel.dtype), unique_indices=True)


@jax.custom_vjp
def sparse_product(
    x: jax.Array, kernel: jax.Array, values: jax.Array, rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """x·(kernel + S) for `x: [..., d_in]`, with `values: [n]` at the entries `[rows, columns]` of S.

    The backward pass builds kernel + S again instead of keeping a copy of every adapted kernel. The gradient of the values is
    gathered from the product xᵀ·dy at once, so no dense gradient outlives its layer.
    """
    # Measured on 2 CPU cores, 4096 tokens, r 8. The gradient of the values at 768 × 768 and 768 × 3072: gathered from the dense
    # product 32 and 148 ms; from gathered rows of xᵀ and dyᵀ, whose products are summed, 59 and 140 ms. The entries are too many
    # for gathers to pay (1.3 to 2 % of the kernel), and rows of xᵀ for all of them would need 200 to 500 MB. kernel + S takes
    # 0.4 and 1.1 ms.
    return x @ with_entries(kernel, values, rows, columns)


def _forward(x: jax.Array, kernel: jax.Array, values: jax.Array, rows: jax.Array, columns: jax.Array) -> Any:
    return sparse_product(x, kernel, values, rows, columns), (x, kernel, values, rows, columns)


def _backward(saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    x, kernel, values, rows, columns = saved
    dx = dy @ with_entries(kernel, values, rows, columns).T
    dense = x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
    # XLA drops `dense` as the frozen kernel's gradient, because nothing reads it.
    return dx, dense, dense[rows, columns].astype(values.dtype), None, None


sparse_product.defvjp(_forward, _backward)


def _initial_values(rng: jax.Array, number: int, zero: bool) -> jax.Array:
    return jnp.zeros(number, jnp.float32) if zero else jax.random.normal(rng, (number,))


def _check_start(init_weights: object) -> None:
    if not isinstance(init_weights, bool):
        raise InputError(f"init_weights of a sparse update must be true or false; got {init_weights!r}")
