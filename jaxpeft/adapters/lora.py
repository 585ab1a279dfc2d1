"""LoRA: y = x·W₀ + s·dropout(x)·A·B, with s = alpha/rank (Hu et al. 2021, arXiv 2106.09685, section 4.1).

This file differs from the paper: A is drawn as PEFT draws it (uniform, ±1/√d_in), not normal. Matrices are stored as Flax
kernels, `a: [d_in, r]` and `b: [r, d_out]`: the transposes of PEFT's `lora_A` and `lora_B`. Options have PEFT's names:

- `use_rslora`: s = alpha/√rank (Kalajdzievski 2023, arXiv 2312.03732).
- `use_dora`: add a magnitude per output (`dora.py`).
- `rank_pattern`, `alpha_pattern`: layers of another rank or alpha.
- `bias`: which biases of the base train too: none, all, or lora_only (those of the adapted layers).
- `lora_bias`: a bias on B.
- `keep_base_zeros`: no update for weights of the base that are zero (`sparse_base.py`). PEFT does not have this option.
- `init_lora_weights`: the initialisation of A and B (`lora_init/`). Three of the initialisations have options: `loftq_config`,
  `eva_config` and `lora_ga_config`, mappings with PEFT's keys and PEFT's defaults.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters import dora, sparse_base
from jaxpeft.adapters.base import (
    Description,
    FrozenLayer,
    ModifiesBase,
    Site,
    SiteParams,
    Statistics,
    check_rank,
    dropout,
    drops,
    in_dtype,
    with_patterns,
)
from jaxpeft.adapters.entry_effects import EntryEffects, of_product
from jaxpeft.adapters.lora_init import (
    Options,
    check_start,
    full_options,
    init_lora,
    loftq,
    pissa_rounds,
)
from jaxpeft.adapters.low_rank import kaiming
from jaxpeft.adapters.products import product
from jaxpeft.adapters.pruned_ranks import without_pruned_ranks
from jaxpeft.errors import InputError, check_choice
from jaxpeft.trees import Layers

Biases = Literal["none", "all", "lora_only"]
"""Which biases of the base train too."""


@dataclass(frozen=True)
class Lora(ModifiesBase):
    """Low-rank adaptation; `dropout` is the rate on the adapter's input only."""

    name: ClassVar[str] = "lora"
    description: ClassVar[Description] = Description(
        title="LoRA",
        equation="y = xW₀ + s·xAB, s = α/r",
        source="Hu et al. 2021, arXiv 2106.09685",
        advice="the default",
        peft="`LORA`",
    )
    prunable: ClassVar[tuple[str, ...]] = ("a", "b")
    products: ClassVar[tuple[tuple[str, str], ...]] = (("a", "b"),)
    entry_effects: ClassVar[EntryEffects | None] = staticmethod(of_product)
    undecayed: ClassVar[tuple[str, ...]] = ("bias",)
    loraplus: ClassVar[tuple[str, ...]] = ("b",)
    default_role: ClassVar[str | None] = "attention_qv"
    shareable: ClassVar[tuple[str, ...]] = ("init_lora_weights", "dropout", "rank", "alpha")
    embeddings: ClassVar[bool] = True
    input_axes: ClassVar[Mapping[str, int]] = {"a": 0}
    output_axes: ClassVar[Mapping[str, int]] = {"b": 1, "m": 0, "bias": 0}
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: Biases = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    loftq_config: Options | None = None
    eva_config: Options | None = None
    lora_ga_config: Options | None = None
    keep_base_zeros: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown initialisation, and options that exclude each other."""
        options = {name: getattr(self, name) for name in ("loftq_config", "eva_config", "lora_ga_config")}
        check_start(self.init_lora_weights, options, lora_bias=self.lora_bias)
        check_choice("bias", self.bias, get_args(Biases))
        if self.lora_bias and self.use_dora:
            raise InputError("lora_bias and use_dora exclude each other, as in PEFT; set one of them to false")
        if self.keep_base_zeros and self.use_dora:
            raise InputError(
                "keep_base_zeros and use_dora exclude each other: DoRA's norms are taken of the unmasked update"
            )
        if self.keep_base_zeros and self.modifies_base:
            raise InputError(
                f"keep_base_zeros cannot be used with init_lora_weights '{self.init_lora_weights}', which fills the zeros of the base; "
                "set one of them to null"
            )

    @property
    def scaling(self) -> float:
        """The factor s on A·B."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def modifies_base(self) -> bool:
        """True if A·B is not zero at first, so that the frozen kernel must be adjusted."""
        return self.init_lora_weights in ("pissa", "olora", "loftq", "lora_ga") or self.draws_start

    @property
    def draws_start(self) -> bool:
        """True if the adjustment of the frozen kernel depends on random numbers: "pissa_niter_N"."""
        return pissa_rounds(self.init_lora_weights) is not None

    @property
    def statistics(self) -> Statistics | None:
        """EVA needs the components of a layer's inputs, LoRA-GA the gradient of its kernel."""
        measured: dict[bool | str, Statistics] = {"eva": "components", "lora_ga": "gradients"}
        return measured.get(self.init_lora_weights)

    @property
    def needs_statistics(self) -> bool:
        """True if the initialisation uses data (`jaxpeft.calibration`)."""
        return self.statistics is not None

    @property
    def needs_full_precision(self) -> bool:
        """True unless OLoRA: as in PEFT, only OLoRA adjusts a quantised kernel, and quantises the result again."""
        return self.modifies_base and self.init_lora_weights != "olora"

    @property
    def exports_difference(self) -> bool:
        """True if the file holds the difference to the initial adapter (PiSSA, OLoRA, LoRA-GA)."""
        return self.modifies_base and self.init_lora_weights != "loftq"

    def fully_trained(self, leaves: Iterable[str], adapted_layers: Iterable[str]) -> set[str]:
        """The biases that the option `bias` selects."""
        if self.bias == "none":
            return set()
        biases = {leaf for leaf in leaves if leaf.rpartition("/")[2] == "bias"}
        return biases if self.bias == "all" else biases & {f"{layer}/bias" for layer in adapted_layers}

    def at(self, path: str) -> Self:
        """The method with the rank and alpha of the first pattern that matches `path`."""
        return with_patterns(self, path)

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`a: [d_in, rank]`, `b: [rank, d_out]`; DoRA adds `m: [d_out]`, the norms of W₀ + s·A·B; `lora_bias` adds `bias: [d_out]` = 0."""
        return self._init(None, rng, site, kernel)

    def init_from(
        self, statistics: jax.Array, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]
    ) -> SiteParams:
        """`init` for `eva`, from components of the inputs, and for `lora_ga`, from the gradient of the kernel."""
        return (
            self._init(statistics, rng, site, kernel)
            if self.needs_statistics
            else super().init_from(statistics, rng, site, kernel)
        )

    def _init(
        self, statistics: jax.Array | None, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]
    ) -> SiteParams:
        start = self.init_lora_weights
        options = self.lora_ga_config if start == "lora_ga" else self.loftq_config
        check_rank(self.rank, site)  # here, because the scaling divides by it
        if self.lora_bias and site.kind == "embedding":
            raise InputError(
                f"lora_bias has no place at the embedding '{site.path}', as in PEFT; leave it out of target_modules"
            )
        params = init_lora(rng, site, self.rank, self.scaling, start, kernel, options=options, statistics=statistics)
        if self.lora_bias:
            zero, drawn = (
                jnp.zeros(site.d_out, jnp.float32),
                kaiming(jax.random.fold_in(rng, 1), (site.d_out,), self.rank),
            )
            params["bias"] = drawn if start is False else zero
        if self.use_dora:
            # m must be the norms of the kernel that the layer uses now: the adjusted one, if it is adjusted.
            frozen_kernel = self.adjust_base(kernel(), params) if self.modifies_base else kernel()
            params["m"] = jnp.linalg.norm(frozen_kernel + self.scaling * _product(params), axis=0)
        return params

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shapes of `a`, `b`, and of `m` and `bias` if they exist. The rank may exceed the layer's width, as it may in a file."""
        shapes: dict[str, tuple[int, ...]] = {"a": (site.d_in, self.rank), "b": (self.rank, site.d_out)}
        extra = [name for name, wanted in (("m", self.use_dora), ("bias", self.lora_bias)) if wanted]
        return {**shapes, **dict.fromkeys(extra, (site.d_out,))}

    def adjust_base(self, frozen_kernel: jax.Array, start: SiteParams) -> jax.Array:
        """W₀ − s·A·B for PiSSA, OLoRA and LoRA-GA; for LoftQ its quantised Q."""
        if self.init_lora_weights == "loftq":
            # Run LoftQ's rounds again: Q does not follow from the last round's A and B.
            options = full_options("loftq_config", self.loftq_config)
            return jnp.asarray(loftq(np.asarray(frozen_kernel), self.rank, options)[0])
        return frozen_kernel - self.scaling * _product(start)

    def deterministic_init(self) -> Self:
        """For "pissa_niter_N" an exact PiSSA; for LoRA-GA a plain LoRA, with a UserWarning.

        A file does not hold the random numbers of "pissa_niter_N": PEFT draws others at every load. It does not hold LoRA-GA's
        gradients either: PEFT then leaves the base as it is, and so does this.
        """
        if self.init_lora_weights == "lora_ga":
            warnings.warn(
                "LoRA-GA changed the base it was trained on, and the file does not hold the gradients to repeat that: the file fits "
                "only a base that was saved after the change; for the unchanged base, export the difference to the initial adapter",
                stacklevel=2,
            )
            return replace(self, init_lora_weights=True)
        return replace(self, init_lora_weights="pissa") if self.draws_start else self

    def at_channels(
        self, params: SiteParams, *, inputs: jax.Array | None, outputs: jax.Array | None
    ) -> SiteParams | None:
        """`a` at the inputs, the others at the outputs. DoRA's norms are those of whole columns, so it needs all inputs."""
        if self.use_dora and inputs is not None:
            return None
        return super().at_channels(params, inputs=inputs, outputs=outputs)

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + s·A·B; for DoRA with its columns at the lengths m; with `keep_base_zeros` with the zeros of W₀."""
        if self.keep_base_zeros:
            return frozen_kernel + self.scaling * sparse_base.masked_update(frozen_kernel, params)
        kernel = frozen_kernel + self.scaling * (params["a"] @ params["b"])
        return dora.at_magnitude(kernel, params["m"]) if self.use_dora else kernel

    def adapted_bias(self, frozen_bias: jax.Array | None, params: SiteParams) -> jax.Array | None:
        """bias + s·(B's bias).

        Raises:
            InputError: if the layer has no bias to which B's bias could be added.
        """
        if "bias" not in params:
            return frozen_bias
        if frozen_bias is None:
            raise InputError(
                "lora_bias cannot be merged into a layer without a bias; leave such layers out of target_modules"
            )
        return frozen_bias + self.scaling * params["bias"]

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """The side path: two thin products. Only `keep_base_zeros` builds a `[d_in, d_out]` one."""
        x = layer.cast(x)
        h = x if layer.is_embedding else dropout(x, self.dropout, rng)  # ids cannot be set to zero
        dropped = rng is not None and drops(self.dropout) and not layer.is_embedding
        if self.keep_base_zeros:
            y = sparse_base.forward(x, h if dropped else None, params, self.scaling, layer)
            return y if "bias" not in params else y + (self.scaling * params["bias"]).astype(layer.dtype)
        delta = product(layer.times(h, params["a"]), params["b"].astype(layer.dtype))
        if "bias" in params:
            delta = delta + params["bias"].astype(layer.dtype)
        delta = in_dtype(self.scaling, delta) * delta
        if not self.use_dora:
            return layer.base(x) + delta
        return dora.forward(x, h if dropped else None, delta, params, self.scaling, layer)

    def without_pruned(self, sites: Layers, masks: Layers) -> tuple[Self, Layers]:
        """Without the ranks that `masks` prune as a whole. All of them stay if the base was adjusted for the initial adapter's rank."""
        if self.modifies_base:
            return self, sites
        method, left = without_pruned_ranks(self, sites, masks)
        # PEFT initialises a layer before it loads it, and the orthogonal initialisation refuses an odd rank.
        orthogonal = method is not self and self.init_lora_weights == "orthogonal"
        return (replace(method, init_lora_weights=True) if orthogonal else method), left


def _product(params: SiteParams) -> jax.Array:
    """A·B in full fp32: the adapter must add back exactly the product that is taken off the kernel."""
    return jnp.matmul(params["a"], params["b"], precision="highest")
