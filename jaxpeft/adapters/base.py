"""What an adapter method is: the contract every file in this folder fulfils.

A method states its meaning once, as a pure function of weights: `kernel(frozen_kernel, params)` (and `adapted_bias`, for the
few that change it). Merging uses it, and the tests use it as the oracle for `forward`, the way the same layer is computed in
training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError
from jaxpeft.trees import Layers, pattern_value

M = TypeVar("M", bound="SiteMethod")

SiteParams = dict[str, jax.Array]
"""One site's adapter parameters: name → array. `kernel` and `forward` also see what all sites share in it."""


PLACEHOLDER = -1
"""The id of a virtual token: `Model.inputs` writes it, and the method that asked for the room replaces what stands there."""


@dataclass(frozen=True)
class Site:
    """A layer that can be adapted: its path and the axes `[d_in, d_out]` of its matrix.

    An embedding is the linear layer of one-hot inputs: `d_in` is its number of rows, `[vocabulary, dim]` its kernel.
    """

    path: str
    d_in: int
    d_out: int
    kind: Literal["linear", "embedding"] = "linear"


@dataclass(frozen=True)
class FrozenLayer:
    """The frozen layer at a site, as `forward` sees it.

    Attributes:
        base: x·W₀ + bias, `[..., d_in] → [..., d_out]`; for an embedding W₀[ids], `[...] → [..., d_out]`.
        weights: maps a dtype to W₀: `[d_in, d_out]` in it (dequantised where the base is stored quantised).
        bias: `[d_out]` or None.
        dtype: what the layer computes in.
        is_embedding: whether x are ids.
    """

    base: Callable[[jax.Array], jax.Array]
    weights: Callable[[Any], jax.Array]
    bias: jax.Array | None
    dtype: Any
    is_embedding: bool = False

    def kernel(self) -> jax.Array:
        """W₀: `[d_in, d_out]` in the compute dtype."""
        return self.weights(self.dtype)

    def cast(self, x: jax.Array) -> jax.Array:
        """The input in the layer's dtype; ids as they are."""
        return x if self.is_embedding else x.astype(self.dtype)

    def times(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """x·matrix, for `matrix: [d_in, k]`: its rows at the ids for an embedding. In the layer's dtype."""
        # Cast first: an fp32 adapter would promote a bf16 layer's output, and with it every layer above.
        matrix = matrix.astype(self.dtype)
        return jnp.take(matrix, x, axis=0) if self.is_embedding else x @ matrix

    def plus_bias(self, y: jax.Array) -> jax.Array:
        """`y: [..., d_out]` with the layer's bias, if it has one."""
        return y if self.bias is None else y + self.bias.astype(self.dtype)


class Method(ABC):
    """One way to fine-tune; implementations are frozen dataclasses, and every field is a flag of that name.

    A method that only trains parameters the model has (BitFit) is done with `fully_trained`; the others are `SiteMethod`s.
    """

    name: ClassVar[str]

    def fully_trained(self, leaves: Iterable[str], adapted_layers: Iterable[str]) -> set[str]:
        """Which of the model's `leaves` (paths) train whole with this method; `adapted_layers` are the layers with an adapter."""
        return set()


class SiteMethod(Method):
    """A method with parameters of its own at the layers it adapts."""

    embeddings: ClassVar[bool] = False
    """Whether embeddings can be adapted too."""
    word_embeddings_only: ClassVar[bool] = False
    """True if it adapts the word embeddings and nothing else, so that there are no `target_modules` to choose."""
    prunable: ClassVar[bool] = True
    """Whether there are matrices that pruning can set entries of to zero."""

    def at(self, path: str) -> Self:
        """The method as it is at the layer `path`: with the rank and alpha that a pattern gives it."""
        return self

    @property
    def modifies_base(self) -> bool:
        """Whether a fresh adapter is not silent, and the frozen kernel is changed by `adjust_base` instead."""
        return False

    @property
    def needs_full_precision(self) -> bool:
        """Whether the frozen matrices at the sites must not be stored quantised, for a fresh adapter is a part of them."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the method puts in front of every row; `Model.inputs` makes room for them."""
        return 0

    @property
    def uses_rng(self) -> bool:
        """Whether training draws random numbers at the sites."""
        return drops(getattr(self, "dropout", 0.0))

    @abstractmethod
    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """Parameters in fp32 for which the layer computes exactly what it did before.

        `kernel` returns the frozen kernel `[d_in, d_out]` in fp32, for the methods that start from it.
        """

    def init_from(
        self, statistics: jax.Array, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]
    ) -> SiteParams:
        """`init`, for a start that was measured on data: `statistics` is what `jaxpeft.calibration` found at `site`.

        Raises:
            InputError: where the method does not start from data.
        """
        raise InputError(f"{self.name} does not start from data: leave out the evidence for layer {site.path}")

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shapes of what `init` returns for `site`."""
        zeros = jax.ShapeDtypeStruct((site.d_in, site.d_out), jnp.float32)
        params = jax.eval_shape(lambda kernel: self.init(jax.random.key(0), site, lambda: kernel), zeros)
        return {name: leaf.shape for name, leaf in params.items()}

    def init_shared(self, rng: jax.Array, sites: Mapping[str, Site]) -> SiteParams:
        """What all sites share and nothing trains, as VeRA's random factors; it is kept with the frozen parameters."""
        return {}

    @property
    def saves_shared(self) -> bool:
        """Whether a file holds what `init_shared` returns; where not, it can be made again from the method alone."""
        return True

    def shared_shapes(self, sites: Mapping[str, Site]) -> dict[str, tuple[int, ...]]:
        """The shapes of what `init_shared` returns for `sites`."""
        shared = jax.eval_shape(lambda: self.init_shared(jax.random.key(0), sites))
        return {name: leaf.shape for name, leaf in shared.items()}

    def adjust_base(self, frozen_kernel: jax.Array, start: SiteParams) -> jax.Array:
        """The frozen kernel `[d_in, d_out]` that goes with the fresh adapter `start`, where `modifies_base`."""
        return frozen_kernel

    def deterministic_init(self) -> Self:
        """The method whose start changes the base as loading a file of this one does: without chance and without data."""
        return self

    @abstractmethod
    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """The adapted kernel `[d_in, d_out]`: what the method means."""

    def adapted_bias(self, frozen_bias: jax.Array | None, params: SiteParams) -> jax.Array | None:
        """The adapted bias `[d_out]`, or None where the layer has none."""
        return frozen_bias

    @abstractmethod
    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """The adapted layer on x, in the layer's dtype: how the method trains. `rng` is None where nothing is random."""

    def penalty(self, sites: Layers) -> jax.Array | None:
        """A term of the training loss that depends on the adapters alone, or None."""
        return None

    def without_pruned(self, sites: Layers, masks: Layers) -> tuple[Self, Layers]:
        """The method and `sites` less what `masks` prunes as a whole, where a smaller layer can be written: for export."""
        return self, sites


def with_patterns(method: M, path: str) -> M:
    """`method` with the rank and the alpha of the first key of its `rank_pattern` and `alpha_pattern` that matches the layer `path`."""
    options: Any = method
    found = {
        option: pattern_value(patterns, path, getattr(options, option))
        for option in ("rank", "alpha")
        if (patterns := getattr(options, f"{option}_pattern", None))
    }
    return replace(options, **found) if found else method


def drops(rate: float | jax.Array) -> bool:
    """Whether anything may be dropped at `rate`; yes, where it is a traced array, as of runs that train together at rates of their own."""
    return not isinstance(rate, int | float) or rate > 0


def dropout(x: jax.Array, rate: float | jax.Array, rng: jax.Array | None) -> jax.Array:
    """`x` with entries set to zero at `rate`, the others scaled up; as it is where there is no `rng` or no rate."""
    if rng is None or not drops(rate):
        return x
    keep = 1.0 - rate
    return jnp.where(jax.random.bernoulli(rng, keep, x.shape), x / in_dtype(keep, x), jnp.zeros((), x.dtype))


def in_dtype(factor: float | jax.Array, x: jax.Array) -> jax.Array:
    """`factor` in the dtype of `x`: an fp32 array would promote a bf16 product, as no Python number does."""
    return jnp.asarray(factor, x.dtype)


def check_masks(method: Method | None, masks: Layers | None) -> None:
    """Raise InputError where there are `masks` and `method` has nothing that can be pruned."""
    if masks and isinstance(method, SiteMethod) and not method.prunable:
        raise InputError(
            f"{method.name} cannot be pruned, for it trains no matrices but scales; set pruning.sparsity to 0"
        )


def check_rank(rank: int, site: Site) -> None:
    """Raise InputError where `rank` is not from 1 to the layer's width."""
    width = min(site.d_in, site.d_out)
    if not 1 <= rank <= width:
        raise InputError(
            f"adapter.rank {rank} is outside 1 to {width}, the width of layer {site.path} ({site.d_in} to {site.d_out})"
        )


def check_positive_rank(rank: int) -> None:
    """Raise InputError where `rank` is below 1: for the methods whose rank no width bounds."""
    if rank < 1:
        raise InputError(f"adapter.rank {rank} must be at least 1")


def kaiming(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """U(±1/√fan_in) in fp32: torch's `kaiming_uniform_` with a = √5, which is √(6 / ((1 + 5)·fan_in)).

    PEFT's start of a linear adapter. Many JAX ports use ±√(6/fan_in), 2.45 times as much.
    """
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)
