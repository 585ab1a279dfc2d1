"""S²FT: train whole attention heads and whole feed-forward channels (Yang et al. 2024, arXiv 2412.06289, section 3).

A head is a group of adjacent inputs of attention's output projection, a channel one input of the second feed-forward layer. So what
trains of a layer is some rows of its kernel, a dense matrix: W₀[rows] + Δ with `delta: [k, d_out]`. The rows are constants of the
layer, `rows: [k]` int32.

The authors permute heads and channels in a model's weights, so that the chosen ones are one slice. Here the weights stay as they are,
and the chosen rows are gathered: the results are the same, and no model has to be permuted back. The method stays fast: the gradient
of delta is one thin product, of the chosen inputs with dy, and nothing but these inputs is kept for it. If only feed-forward
layers are adapted, the backward pass ends at the first of them.

PEFT has no S²FT. Its files are SHiRA's, whose indices can name any entries, so torch PEFT loads them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Description, FrozenLayer, HasConstants, Site, SiteParams, Statistics
from jaxpeft.adapters.entry_effects import EntryEffects, of_entries
from jaxpeft.adapters.sparse_indices import largest
from jaxpeft.errors import InputError, check_choice

Selection = Literal["random", "weight", "activation", "gradient"]
"""How heads and channels are chosen: at random, by the norm of their rows of W₀, by the mean |input|, or by the gradient's norm."""


@dataclass(frozen=True)
class S2ft(HasConstants):
    """Structured sparse fine-tuning.

    Attributes:
        channels: feed-forward channels that train in each adapted layer.
        heads: attention heads that train in each adapted output projection of attention.
        selection: how they are chosen.
        select_top: True for those with the largest score, False for the smallest; random ones have none.
        random_seed: draws random ones apart from the run's seed.
        attention_modules: the adapted layers that are output projections of attention, as endings of dotted names. All others
            train channels. A run takes them from the encoder's family.
        head_dim: inputs of one head, for these. A run takes it from the model.
    """

    name: ClassVar[str] = "s2ft"
    description: ClassVar[Description] = Description(
        title="S²FT",
        equation="W = W₀ + Δ in whole heads and channels",
        source="Yang et al. 2024, arXiv 2412.06289",
        advice="a sparse update that is fast: dense rows, thin gradients",
        peft="`SHIRA`, with its rows as indices",
    )
    constants: ClassVar[tuple[str, ...]] = ("rows",)
    prunable: ClassVar[tuple[str, ...]] = ("delta",)
    entry_effects: ClassVar[EntryEffects | None] = staticmethod(of_entries)
    default_role: ClassVar[str | None] = "output_projections"
    channels: int = 32
    heads: int = 1
    selection: Selection = "random"
    select_top: bool = True
    random_seed: int | None = None
    attention_modules: Sequence[str] = ()
    head_dim: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown selection, and numbers below 1."""
        check_choice("selection", self.selection, get_args(Selection))
        for name in ("channels", "heads"):
            if (value := getattr(self, name)) < 1:
                raise InputError(
                    f"adapter.{name} is {value}; it must be at least 1; leave layers out with target_modules"
                )
        if self.selection == "random" and not self.select_top:
            raise InputError("adapter.select_top false has no meaning for selection 'random', which scores nothing")

    def at(self, path: str) -> Self:
        """The method with those `attention_modules` that name the layer."""
        name = path.replace("/", ".")
        return replace(self, attention_modules=tuple(end for end in self.attention_modules if name.endswith(end)))

    @property
    def statistics(self) -> Statistics | None:
        """The measurement that `selection` scores with, if it needs one."""
        measured: dict[str, Statistics] = {"activation": "magnitudes", "gradient": "gradients"}
        return measured.get(self.selection)

    @classmethod
    def depends_on_seed(cls, options: Mapping[str, Any]) -> bool:
        """True for random rows without a seed of their own, and for those that the run's first batches choose."""
        selection = options.get("selection") or cls.selection
        return selection != "weight" and (selection != "random" or options.get("random_seed") is None)

    def num_rows(self, site: Site) -> int:
        """How many rows of `site`'s kernel train. Only meaningful for the method of one layer (`at`).

        Raises:
            InputError: if the layer has fewer, or its inputs are no whole heads.
        """
        group, number = self._groups(site)
        return group * number

    def _groups(self, site: Site) -> tuple[int, int]:
        """Inputs of a group, and the number of groups that train."""
        if not self.attention_modules:
            if self.channels > site.d_in:
                raise InputError(
                    f"adapter.channels {self.channels} is more than the {site.d_in} inputs of layer {site.path}; lower it"
                )
            return 1, self.channels
        if not self.head_dim or site.d_in % self.head_dim:
            raise InputError(
                f"head_dim {self.head_dim}: the {site.d_in} inputs of layer {site.path} are no whole heads; give the inputs of one "
                "head, or leave the layer out of attention_modules"
            )
        if self.heads * self.head_dim > site.d_in:
            raise InputError(
                f"adapter.heads {self.heads} is more than the {site.d_in // self.head_dim} heads of layer {site.path}; lower it"
            )
        return self.head_dim, self.heads

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`delta: [k, d_out]` = 0."""
        return {"delta": jnp.zeros((self.num_rows(site), site.d_out), jnp.float32)}

    def init_constants(
        self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array], statistics: jax.Array | None = None
    ) -> SiteParams:
        """`rows`, ascending."""
        group, number = self._groups(site)
        if self.selection == "random":
            if self.random_seed is not None:
                rng = jax.random.fold_in(jax.random.key(self.random_seed), zlib.crc32(site.path.encode()))
            chosen = jax.random.permutation(rng, site.d_in // group)[:number]
        else:
            scores = self._scores(site, kernel, statistics).reshape(-1, group).sum(axis=1)
            chosen = largest(scores if self.select_top else -scores, number)
        rows = jnp.sort(chosen)[:, None] * group + jnp.arange(group)
        return {"rows": rows.reshape(-1).astype(jnp.int32)}

    def _scores(self, site: Site, kernel: Callable[[], jax.Array], statistics: jax.Array | None) -> jax.Array:
        """The score of each input: `[d_in]`, at least 0."""
        if self.selection == "weight":
            return jnp.square(kernel()).sum(axis=1)
        wanted = (site.d_in,) if self.selection == "activation" else (site.d_in, site.d_out)
        if statistics is None or statistics.shape != wanted:
            found = "none" if statistics is None else f"some of shape {list(statistics.shape)}"
            raise InputError(
                f"selection '{self.selection}' needs statistics of shape {list(wanted)} of layer {site.path}, and there are {found}: "
                "give init_adapters(statistics=…) what jaxpeft.calibration.calibrate returns"
            )
        return statistics if self.selection == "activation" else jnp.square(statistics).sum(axis=1)

    def constant_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """`rows: [k]`."""
        return {"rows": (self.num_rows(site),)}

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ with delta added to the chosen rows."""
        return with_rows(frozen_kernel, params["delta"], params["rows"])

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """One product with the changed kernel; in bf16 the chosen inputs' product beside x·W₀."""
        x, delta = layer.cast(x), params["delta"]
        if jnp.finfo(layer.dtype).bits < 32:  # beside W₀ small values would be rounded away
            return layer.base(x) + layer.times(x[..., params["rows"]], delta)
        return layer.plus_bias(rows_product(x, layer.kernel(), delta, params["rows"]))


def with_rows(kernel: jax.Array, delta: jax.Array, rows: jax.Array) -> jax.Array:
    """`kernel: [d_in, d_out]` with `delta: [k, d_out]` added to its `rows: [k]`, all different."""
    return kernel.at[rows].add(delta.astype(kernel.dtype), unique_indices=True)


@jax.custom_vjp
def rows_product(x: jax.Array, kernel: jax.Array, delta: jax.Array, rows: jax.Array) -> jax.Array:
    """x·(kernel + Δ) for `x: [..., d_in]`, with `delta: [k, d_out]` in the `rows` of Δ. The frozen kernel gets no gradient.

    For the backward pass it keeps the chosen inputs, `[..., k]`, and neither x nor the changed kernel.
    """
    # Measured on 2 CPU cores, 4096 tokens, k = 32, kernels of 768 × 768 and 3072 × 768. Forward: one product with the changed
    # kernel 38 and 141 ms; beside it x[..., rows]·delta instead, 42 and 141 ms. The gradient of x: 38 and 155 ms against 41 and
    # 169 ms. The gradient of delta: 5 ms, where the dense one takes 36 and 146 ms. Changing the kernel takes 0.3 and 0.7 ms.
    return x @ with_rows(kernel, delta, rows)


def _forward(x: jax.Array, kernel: jax.Array, delta: jax.Array, rows: jax.Array) -> Any:
    return rows_product(x, kernel, delta, rows), (x[..., rows], kernel, delta, rows)


def _backward(saved: Any, dy: jax.Array) -> tuple[Any, ...]:
    chosen, kernel, delta, rows = saved
    dx = dy @ with_rows(kernel, delta, rows).T
    d_delta = chosen.reshape(-1, chosen.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])
    return dx, None, d_delta.astype(delta.dtype), None


rows_product.defvjp(_forward, _backward)
