"""(IA)³: y = (x·W₀ + bias) ⊙ l, and in feed-forward layers y = (x ⊙ l)·W₀ + bias (Liu et al. 2022, arXiv 2205.05638, section 3.3).

The paper scales keys, values and the activations inside the feed-forward network, and initialises l at one. This file differs
from it as PEFT does: it scales the output of a linear layer, bias included, or its input. So any linear layer can be adapted, and
the feed-forward activations are the input of the layer after them (`output.dense`, `lin2`). Either way W = W₀ ⊙ l, with
`l: [1, d_out]` or `l: [d_in, 1]`: the transposes of PEFT's `ia3_l`.

Linear layers only, as in PEFT 0.21. It cannot be pruned: a zero in l switches a unit off; the no-op is a one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Description, FrozenLayer, Site, SiteMethod, SiteParams
from jaxpeft.errors import InputError


@dataclass(frozen=True)
class Ia3(SiteMethod):
    """Learned rescaling.

    `feedforward_modules` names the layers that are scaled at their input. PEFT's rule for it is not that of target_modules: a list
    has endings of dotted names ("lin2", but also "in2"), and a string is a regular expression for whole names.
    """

    name: ClassVar[str] = "ia3"
    description: ClassVar[Description] = Description(
        title="IA³",
        equation="y = l ⊙ (xW₀ + bias), or (l ⊙ x)W₀ + bias",
        source="Liu et al. 2022, arXiv 2205.05638",
        advice="few examples, and next to no parameters",
        peft="`IA3`",
    )
    default_role: ClassVar[str | None] = "attention_kv_feedforward"
    feedforward_modules: str | Sequence[str] = ()
    init_ia3_weights: bool = True

    @property
    def scales_input(self) -> bool:
        """True if the layer is scaled at its input. Only meaningful for the method of one layer (`at`)."""
        return bool(self.feedforward_modules)

    def at(self, path: str) -> Self:
        """The method with those `feedforward_modules` that name the layer. If none does, the layer's output is scaled.

        Raises:
            InputError: if `feedforward_modules` is a string and not a regular expression.
        """
        name, modules = path.replace("/", "."), self.feedforward_modules
        if not isinstance(modules, str):
            return replace(self, feedforward_modules=[ending for ending in modules if name.endswith(ending)])
        try:
            matched = re.fullmatch(modules, name)
        except re.error as error:
            raise InputError(
                f"feedforward_modules '{modules}' is not a regular expression: {error}; for layers by name write a list"
            ) from error
        return self if matched else replace(self, feedforward_modules="")

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`l` of ones: `[d_in, 1]` for a scaled input, else `[1, d_out]`. Without `init_ia3_weights` ~ N(0, 1), for tests."""
        shape = (site.d_in, 1) if self.scales_input else (1, site.d_out)
        return {"l": jnp.ones(shape, jnp.float32) if self.init_ia3_weights else jax.random.normal(rng, shape)}

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ ⊙ l scales the rows of W₀ or its columns."""
        return frozen_kernel * params["l"]

    def adapted_bias(self, frozen_bias: jax.Array | None, params: SiteParams) -> jax.Array | None:
        """The bias times l if the output is scaled; unchanged if the input is."""
        return frozen_bias if frozen_bias is None or self.scales_input else frozen_bias * params["l"][0]

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """Scale the activations, which is cheaper than scaling the kernel."""
        if self.scales_input:
            return layer.base(_scaled(x, params["l"], layer.dtype))
        return _scaled(layer.base(x), params["l"], layer.dtype)


def _scaled(x: jax.Array, l: jax.Array, dtype: Any) -> jax.Array:  # noqa: E741
    # Multiply in fp32 and round once, as in PEFT: bf16 would round l itself, near 1 in steps of 0.8 %.
    return (x.astype(jnp.float32) * l.reshape(-1)).astype(dtype)
