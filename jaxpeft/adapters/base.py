"""The contract of an adapter method: every file in this folder fulfils it.

A method is defined twice. `kernel(frozen_kernel, params)`, with `adapted_bias` if it changes the bias, returns the adapted
weights. Merging uses it, and the tests use it as the reference. `forward` computes the same layer in training.

A method also describes itself, in class variables of `Method`. The command line, the optimizer, pruning and the reports read
them there, so a new method is one new file and one line in `jaxpeft.adapters.METHODS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

import jax
import jax.numpy as jnp

from jaxpeft.adapters.entry_effects import EntryEffects
from jaxpeft.adapters.options import check_options
from jaxpeft.adapters.products import product
from jaxpeft.errors import InputError
from jaxpeft.trees import Layers, pattern_value

M = TypeVar("M", bound="SiteMethod")

SiteParams = dict[str, jax.Array]
"""One site's adapter parameters: name → array. `kernel` and `forward` also find in it the factors that all sites share, and the
site's constants."""


Statistics = Literal["components", "gradients", "magnitudes"]
"""A measurement at a layer: principal components of its inputs, the gradient of its kernel, the mean |x| of each input."""


PLACEHOLDER = -1
"""The id of a virtual token. `Model.inputs` writes it; the method that asked for the token replaces its embedding."""


@dataclass(frozen=True)
class Description:
    """A method in words, for the model card and the README's table.

    Attributes:
        title: its name as the paper writes it.
        equation: in one line.
        source: authors, year and paper.
        advice: when to choose it, in one line.
        peft: how its file looks to torch PEFT; "" if PEFT does not have the method, so that its files are jaxpeft's own.
    """

    title: str
    equation: str
    source: str
    advice: str
    peft: str = ""


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
        weights: maps a dtype to W₀: `[d_in, d_out]` in that dtype, dequantised if the base is stored quantised.
        bias: `[d_out]` or None.
        dtype: the dtype in which the layer computes.
        is_embedding: True if x are ids.
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
        """`x` in the layer's dtype; ids stay as they are."""
        return x if self.is_embedding else x.astype(self.dtype)

    def times(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """x·matrix in the layer's dtype, for `matrix: [d_in, k]`; for an embedding the matrix's rows at the ids."""
        # Cast first: an fp32 adapter would promote a bf16 layer's output, and with it every layer above.
        matrix = matrix.astype(self.dtype)
        return jnp.take(matrix, x, axis=0) if self.is_embedding else product(x, matrix)

    def plus_bias(self, y: jax.Array) -> jax.Array:
        """`y: [..., d_out]` plus the layer's bias, if it has one."""
        return y if self.bias is None else y + self.bias.astype(self.dtype)


class Method(ABC):
    """One way to fine-tune. Implementations are frozen dataclasses; every field is an option of that name.

    A method that only trains parameters of the model itself (BitFit) needs no more than `fully_trained`. The others are
    `SiteMethod`s. The class variables have defaults that are safe for a new method: nothing of it can be pruned, all of it
    decays, and the user names its target modules.
    """

    name: ClassVar[str]
    """The method's key in `jaxpeft.adapters.METHODS`."""
    description: ClassVar[Description]
    prunable: ClassVar[tuple[str, ...]] = ()
    """Parameters that pruning may set to zero, by name: the matrices, if a zero in them means "no change"."""
    products: ClassVar[tuple[tuple[str, str], ...]] = ()
    """The low-rank products L·R in the update, as names of L `[n, r]` and R `[r, m]`: pruning may take whole ranks of them. A layer may
    lack some. If there is one, the update depends on it alone."""
    entry_effects: ClassVar[EntryEffects | None] = None
    """How much the update changes if an entry is set to zero (`adapters.entry_effects`), for the criterion "product"; None: not known."""
    allocated: ClassVar[tuple[str, ...]] = ()
    """Parameters that the method prunes by a budget of its own (AdaLoRA)."""
    redrawn: ClassVar[tuple[str, ...]] = ()
    """Constants that may be redrawn in training. The masks then hold them, under the same names."""
    undecayed: ClassVar[tuple[str, ...]] = ()
    """Parameters at the sites to which weight decay is not applied."""
    loraplus: ClassVar[tuple[str, ...]] = ()
    """Matrices that LoRA+ trains at its higher learning rate; () if LoRA+ is not defined for the method."""
    default_role: ClassVar[str | None] = None
    """Which layers it adapts by default, as a role that every model family maps to names; None if it has no choice of layers."""
    shareable: ClassVar[tuple[str, ...]] = ()
    """Options in which runs that train in one program may differ (`jaxpeft.runs.sweep_key`)."""

    def __new__(cls, *values: Any, **options: Any) -> Self:
        """Refuse an option that the method does not have or that is out of its range, and say what PEFT's name for it is here."""
        names: list[str] = [option.name for option in fields(cls)] if is_dataclass(cls) else []
        check_options(cls, {**dict(zip(names, values, strict=False)), **options}, cls.__name__)
        return super().__new__(cls)

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Parameters at the sites that move by this much towards zero after every step, and stop there (a soft threshold; SoRA's gate)."""
        return {}

    def fully_trained(self, leaves: Iterable[str], adapted_layers: Iterable[str]) -> set[str]:
        """Which of the model's `leaves` (paths) the method trains fully; `adapted_layers` are the layers with an adapter."""
        return set()


class SiteMethod(Method):
    """A method with parameters of its own at the layers it adapts."""

    embeddings: ClassVar[bool] = False
    """True if embeddings can be adapted too."""
    input_axes: ClassVar[Mapping[str, int]] = {}
    """Parameters with an axis that counts the layer's inputs → that axis. See `at_channels`."""
    output_axes: ClassVar[Mapping[str, int]] = {}
    """Parameters with an axis that counts the layer's outputs → that axis."""
    word_embeddings_only: ClassVar[bool] = False
    """True if it adapts the word embeddings and nothing else, so that there are no `target_modules` to choose."""

    def at(self, path: str) -> Self:
        """The method as it is at the layer `path`, with the rank and alpha that a pattern gives that layer."""
        return self

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the method puts before every row; `Model.inputs` makes room for them."""
        return 0

    @property
    def uses_rng(self) -> bool:
        """True if training draws random numbers at the sites."""
        return drops(getattr(self, "dropout", 0.0))

    @property
    def statistics(self) -> Statistics | None:
        """What `jaxpeft.calibration` must measure of the data before the method can be initialised; None: nothing."""
        return None

    @abstractmethod
    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """Parameters in fp32 with which the layer computes exactly what it did before.

        `kernel` returns the frozen kernel `[d_in, d_out]` in fp32, for initialisations that need it.
        """

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters that `init` returns for `site`."""
        zeros = jax.ShapeDtypeStruct((site.d_in, site.d_out), jnp.float32)
        params = jax.eval_shape(lambda kernel: self.init(jax.random.key(0), site, lambda: kernel), zeros)
        return {name: leaf.shape for name, leaf in params.items()}

    @abstractmethod
    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """The adapted kernel `[d_in, d_out]`: the meaning of the method."""

    def adapted_bias(self, frozen_bias: jax.Array | None, params: SiteParams) -> jax.Array | None:
        """The adapted bias `[d_out]`, or None if the layer has none."""
        return frozen_bias

    @abstractmethod
    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """The adapted layer on x, in the layer's dtype, as it is computed in training. `rng` is None if nothing is random."""

    def at_channels(
        self, params: SiteParams, *, inputs: jax.Array | None, outputs: jax.Array | None
    ) -> SiteParams | None:
        """The parameters with which `forward` computes a layer that is cut to some channels (`adapters.channels`).

        Args:
            params: those of the whole layer.
            inputs: int32 `[k]`, the rows of the kernel that are left; None: all.
            outputs: int32 `[k]`, the columns that are left; None: all.

        Returns:
            `params` cut along `input_axes` and `output_axes`; None if the method does not declare these axes, because only the
            whole layer can then be computed.
        """
        for channels, axes in ((inputs, self.input_axes), (outputs, self.output_axes)):
            if channels is not None and not axes:
                return None
            params = {
                name: leaf if channels is None or name not in axes else at_indices(leaf, channels, axes[name])
                for name, leaf in params.items()
            }
        return params

    def penalty(self, sites: Layers) -> jax.Array | None:
        """A term of the training loss that depends on the adapters only, or None."""
        return None

    def without_pruned(self, sites: Layers, masks: Layers) -> tuple[Self, Layers]:
        """For export: the method and `sites` without the parts that `masks` prunes as a whole, if a smaller layer can be written."""
        return self, sites

    def as_saved(self, sites: Layers) -> tuple[SiteMethod, Layers]:
        """For export: the method and `sites` that a file holds, if another method computes the same and more programs can read it."""
        return self, sites


class SharesFactors(SiteMethod):
    """A method whose sites share frozen factors, such as VeRA's random matrices. They are kept with the frozen parameters."""

    @abstractmethod
    def init_shared(self, rng: jax.Array, sites: Mapping[str, Site]) -> SiteParams:
        """The factors that all `sites` share; they never train."""

    @property
    def saves_shared(self) -> bool:
        """True if a file holds the shared factors; False if the method's options are enough to make them again."""
        return True

    def shared_shapes(self, sites: Mapping[str, Site]) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors that `init_shared` returns for `sites`."""
        shared = jax.eval_shape(lambda: self.init_shared(jax.random.key(0), sites))
        return {name: leaf.shape for name, leaf in shared.items()}


class HasConstants(SiteMethod):
    """A method with frozen arrays of its own at each site, such as the indices of a sparse update.

    They are kept with the frozen parameters (`jaxpeft.trees.CONSTANTS`). They never train, and are no parameters of the model.
    """

    constants: ClassVar[tuple[str, ...]]
    """Their names."""

    @property
    def saves_constants(self) -> bool:
        """True if a file holds the constants; False if the base's weights are enough to make them again."""
        return True

    @classmethod
    def depends_on_seed(cls, options: Mapping[str, Any]) -> bool:
        """True if runs of other seeds get other constants; `options` are the method's, as the flags give them (None: default)."""
        return True

    @abstractmethod
    def init_constants(
        self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array], statistics: jax.Array | None = None
    ) -> SiteParams:
        """The constants of `site`. `kernel` returns the frozen kernel `[d_in, d_out]` in fp32; `statistics` is what `statistics` asks for.

        Raises:
            InputError: if the site is too small for the method's options, or the statistics are missing or do not fit.
        """

    def check_constants(self, site: Site, constants: SiteParams) -> None:
        """Raise InputError if `constants`, read from a file, are none of `site`."""

    def check_remade(self, site: Site, kernel: jax.Array, constants: SiteParams) -> None:
        """Raise InputError if a file without `constants` would not say what they are; `kernel: [d_in, d_out]` is the frozen one."""

    @abstractmethod
    def constant_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shapes of the constants that `init_constants` returns for `site`."""


class ModifiesBase(SiteMethod):
    """A method that can be initialised from the frozen kernel or from data, as LoRA with PiSSA or EVA.

    If a new adapter changes the output, `adjust_base` subtracts that change from the frozen kernel. So the model as a whole
    computes what it did before.
    """

    @property
    @abstractmethod
    def modifies_base(self) -> bool:
        """True if a new adapter changes the output, so that `adjust_base` must adjust the frozen kernel."""

    @property
    def needs_full_precision(self) -> bool:
        """True if a new adapter is a part of the frozen matrices in full precision, so that they must not be stored quantised."""
        return self.modifies_base

    @abstractmethod
    def adjust_base(self, frozen_kernel: jax.Array, start: SiteParams) -> jax.Array:
        """The frozen kernel `[d_in, d_out]` that goes with the new adapter `start`, if `modifies_base`."""

    def deterministic_init(self) -> Self:
        """This method with a deterministic, data-free initialisation, as used when a file is loaded."""
        return self

    def init_from(
        self, statistics: jax.Array, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]
    ) -> SiteParams:
        """`init` from data: `statistics` is what `jaxpeft.calibration` measured at `site`.

        Raises:
            InputError: if the method's initialisation does not use data.
        """
        raise InputError(
            f"{self.name} is not initialised from data: leave out the calibration statistics of layer {site.path}"
        )


def with_patterns(method: M, path: str) -> M:
    """`method` with the rank and the alpha for the layer `path`: the first key of each pattern that matches gives the value."""
    options: Any = method
    found = {
        option: pattern_value(patterns, path, getattr(options, option))
        for option in ("rank", "alpha")
        if (patterns := getattr(options, f"{option}_pattern", None))
    }
    return replace(options, **found) if found else method


def drops(rate: float | jax.Array) -> bool:
    """True if dropout at `rate` may drop anything. A traced rate always may: replicas of one program have rates of their own."""
    return not isinstance(rate, int | float) or rate > 0


def dropout(x: jax.Array, rate: float | jax.Array, rng: jax.Array | None) -> jax.Array:
    """`x` with entries set to zero at `rate` and the others scaled up; unchanged without an `rng` or a rate."""
    if rng is None or not drops(rate):
        return x
    keep = 1.0 - rate
    return jnp.where(jax.random.bernoulli(rng, keep, x.shape), x / in_dtype(keep, x), jnp.zeros((), x.dtype))


def in_dtype(factor: float | jax.Array, x: jax.Array) -> jax.Array:
    """`factor` in the dtype of `x`: unlike a Python number, an fp32 array would promote a bf16 product."""
    return jnp.asarray(factor, x.dtype)


def at_indices(x: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
    """`x` at the `indices: [k]` of one axis. They must be inside the axis and without repetition."""
    return jnp.take(x, indices, axis=axis, mode="clip", unique_indices=True)


def check_masks(method: Method | None, masks: Layers | None) -> None:
    """Raise InputError if there are `masks` and no parameter of `method` can be pruned, unless all of them are redrawn constants."""
    if not masks or not isinstance(method, SiteMethod) or method.prunable or method.allocated:
        return
    if not {name for group in masks.values() for name in group} <= set(method.redrawn):
        raise InputError(
            f"{method.name} cannot be pruned: it trains no matrices in which a zero means 'no change'; set pruning.sparsity to 0"
        )


def check_rank(rank: int, site: Site) -> None:
    """Raise InputError unless `rank` is from 1 to the layer's width."""
    width = min(site.d_in, site.d_out)
    if not 1 <= rank <= width:
        raise InputError(
            f"adapter.rank {rank} is outside 1 to {width}, the width of layer {site.path} ({site.d_in} to {site.d_out})"
        )
