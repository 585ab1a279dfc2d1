"""AdaLoRA: y = x·W₀ + s·dropout(x)·(A ⊙ E)·B, an SVD whose triplets (aₖ, eₖ, bₖ) compete for a budget of ranks.

Zhang et al. 2023, arXiv 2303.10512: the form is equation 3 and the penalty equation 4. The budget is section 3.3; it is a
schedule and no part of a layer, so it is in `jaxpeft.pruning.allocation`. As in PEFT, and not in the paper:

- s = alpha/(init_r + 1e-5), however many triplets are left later. If alpha ≤ 0, the number of stored triplets replaces it.
- The penalty is the mean of ‖AᵀA − I‖ and ‖BBᵀ − I‖ over all layers (Frobenius norms, not their squares), times
  `orth_reg_weight`.

Options have PEFT's names. `total_step` is the number of steps the schedule is made for, None while it is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import Description, FrozenLayer, Site, SiteMethod, SiteParams, dropout
from jaxpeft.adapters.lora import Biases, Lora
from jaxpeft.adapters.products import product
from jaxpeft.errors import InputError, check_choice
from jaxpeft.trees import Layers


@dataclass(frozen=True)
class AdaLora(SiteMethod):
    """Low-rank adaptation with an adaptive rank: from `init_r` triplets in every layer to `target_r` on average.

    Attributes:
        target_r: final number of triplets per layer, on average.
        init_r: initial number of triplets per layer.
        tinit: steps before the budget falls.
        tfinal: steps after the budget's last fall, with fixed triplets.
        deltaT: steps between two allocations.
        beta1: decay of the running mean of the importance.
        beta2: decay of the running mean of its uncertainty.
        orth_reg_weight: weight of the penalty.
        alpha: numerator of s.
        dropout: rate on the adapter's input only.
        bias: which biases of the base train too, as in LoRA.
        init_lora_weights: False draws E too, so that a new adapter is not a no-op.
        rank_pattern: a layer's dotted name + ".lora_E" → one bool for each of the init_r triplets, True = kept: PEFT's
            `rank_pattern`, empty before an allocation.
        total_step: steps of the schedule.
    """

    name: ClassVar[str] = "adalora"
    description: ClassVar[Description] = Description(
        title="AdaLoRA",
        equation="W = W₀ + s·PΛQ, entries of Λ pruned to a budget",
        source="Zhang et al. 2023, arXiv 2303.10512",
        advice="long runs that should find each layer's rank",
        peft="`ADALORA`",
    )
    allocated: ClassVar[tuple[str, ...]] = ("e",)
    default_role: ClassVar[str | None] = "adalora"
    input_axes: ClassVar[Mapping[str, int]] = {"a": 0}
    output_axes: ClassVar[Mapping[str, int]] = {"b": 1}
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    alpha: float = 8.0
    dropout: float = 0.0
    bias: Biases = "none"
    init_lora_weights: bool = True
    rank_pattern: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    total_step: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown choice of biases, and options from which no schedule can be made."""
        check_choice("bias", self.bias, get_args(Biases))
        checks = [
            ("init_r", self.init_r, self.init_r >= 1, "at least 1"),
            ("target_r", self.target_r, self.target_r >= 0, "at least 0"),
            ("tinit", self.tinit, self.tinit >= 0, "at least 0"),
            ("tfinal", self.tfinal, self.tfinal >= 0, "at least 0"),
            ("deltaT", self.deltaT, self.deltaT >= 1, "at least 1"),
            ("beta1", self.beta1, 0 < self.beta1 < 1, "between 0 and 1"),
            ("beta2", self.beta2, 0 < self.beta2 < 1, "between 0 and 1"),
            ("orth_reg_weight", self.orth_reg_weight, self.orth_reg_weight >= 0, "at least 0"),
        ]
        for option, value, fine, wanted in checks:
            if not fine:
                raise InputError(f"adapter.{option} is {value}; for AdaLoRA it must be {wanted}")
        for layer, kept in self.rank_pattern.items():
            if isinstance(kept, int) or len(kept) != self.init_r:
                raise InputError(
                    f"AdaLoRA's rank_pattern needs one bool for each of the init_r ({self.init_r}) triplets, and for "
                    f"'{layer}' it is {kept}; leave it out: training finds it"
                )

    def fully_trained(self, leaves: Iterable[str], adapted_layers: Iterable[str]) -> set[str]:
        """The biases that the option `bias` selects."""
        return Lora(bias=self.bias).fully_trained(leaves, adapted_layers)

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`a: [d_in, init_r]`, `b: [init_r, d_out]` ~ N(0, 0.02²), `e: [1, init_r]` = 0. Without `init_lora_weights` all are ~ N(0, 1).

        Raises:
            InputError: if init_r exceeds the layer's width.
        """
        width = min(site.d_in, site.d_out)
        if self.init_r > width:
            raise InputError(f"adapter.init_r {self.init_r} exceeds {width}, the width of layer {site.path}")
        shapes = self.shapes(site)
        drawn = {
            name: jax.random.normal(key, shapes[name])
            for name, key in zip("abe", jax.random.split(rng, 3), strict=True)
        }
        if not self.init_lora_weights:
            return drawn
        return {"a": 0.02 * drawn["a"], "b": 0.02 * drawn["b"], "e": jnp.zeros(shapes["e"], jnp.float32)}

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """`a`, `b` and `e` with the triplets that `rank_pattern` keeps in the layer, possibly none."""
        kept = self.rank_pattern.get(_key(site.path))
        rank = self.init_r if kept is None else sum(kept)
        return {"a": (site.d_in, rank), "b": (rank, site.d_out), "e": (1, rank)}

    def _scaled(self, params: SiteParams) -> jax.Array:
        """s·(A ⊙ E): `[d_in, r]`."""
        alpha = self.alpha if self.alpha > 0 else float(params["a"].shape[1])
        return params["a"] * (params["e"] * (alpha / (self.init_r + 1e-5)))

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + s·(A ⊙ E)·B."""
        return frozen_kernel + self._scaled(params) @ params["b"]

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """A side path of two thin products, as in LoRA."""
        h = dropout(layer.cast(x), self.dropout, rng)
        return layer.base(x) + product(layer.times(h, self._scaled(params)), params["b"].astype(layer.dtype))

    def penalty(self, sites: Layers) -> jax.Array | None:
        """orth_reg_weight · the mean of ‖AᵀA − I‖ and ‖BBᵀ − I‖ over all layers. Pruned triplets count too."""
        if not self.orth_reg_weight or not sites:
            return None
        covariances = [c for p in sites.values() for c in (p["a"].T @ p["a"], p["b"] @ p["b"].T)]
        norms = [_norm(c - jnp.eye(len(c), dtype=c.dtype)) for c in covariances]
        return self.orth_reg_weight * sum(norms[1:], norms[0]) / len(norms)

    def without_pruned(self, sites: Layers, masks: Layers) -> tuple[Self, Layers]:
        """The method with the `rank_pattern` that follows from the `masks` over `e`, and `sites` with the triplets they keep."""
        pattern, left = dict(self.rank_pattern), {}
        for path, params in sites.items():
            mask = masks.get(path, {}).get("e")
            keep = np.ones(params["e"].shape[1], bool) if mask is None else np.asarray(mask)[0]
            remaining = iter(keep.tolist())
            # If the layer was cut before, its mask covers only the triplets that were left.
            before = pattern.get(_key(path), [True] * len(keep))
            pattern[_key(path)] = [held and next(remaining) for held in before]
            chosen = np.flatnonzero(keep)
            left[path] = {"a": params["a"][:, chosen], "b": params["b"][chosen], "e": params["e"][:, chosen]}
        # With alpha ≤ 0 the scaling would change with the number of triplets: record the value that was trained with.
        return replace(self, rank_pattern=pattern, alpha=self.alpha if self.alpha > 0 else float(self.init_r)), left


def _key(path: str) -> str:
    return path.replace("/", ".") + ".lora_E"


def _norm(matrix: jax.Array) -> jax.Array:
    """‖matrix‖, with gradient 0 at 0 as in torch; the gradient of JAX's own norm is NaN there."""
    square = jnp.square(matrix).sum()
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
