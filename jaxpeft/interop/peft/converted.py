"""Adapters that adjusted the base at initialisation, as plain LoRA for the original base (PEFT's `subtract_mutated_init`)."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from jaxpeft.adapters import Lora
from jaxpeft.trees import Layers


def without_start(method: Lora, sites: Layers, start: Layers) -> tuple[Lora, Layers]:
    """A LoRA of twice the rank on W₀ that equals `sites` on W₀ − s·A₀·B₀: `A' = [A, A₀]`, `B' = [B; −B₀]`.

    A·B − A₀·B₀ = A'·B'. The scaling stays s, so alpha doubles with the rank (rank-stabilised: it grows by √2). DoRA's magnitudes stay,
    because the sum stays. PEFT does not convert rank-stabilised adapters with patterns; here alpha_pattern grows by √2 too.
    """
    converted = {
        path: {
            **params,
            "a": jnp.concatenate([params["a"], start[path]["a"]], axis=1),
            "b": jnp.concatenate([params["b"], -start[path]["b"]], axis=0),
        }
        for path, params in sites.items()
    }
    growth = 2**0.5 if method.use_rslora else 2
    plain = replace(
        method,
        rank=2 * method.rank,
        alpha=growth * method.alpha,
        rank_pattern={name: 2 * rank for name, rank in method.rank_pattern.items()},
        alpha_pattern={name: growth * alpha for name, alpha in method.alpha_pattern.items()},
        init_lora_weights=True,
        lora_ga_config=None,
    )
    return plain, converted
