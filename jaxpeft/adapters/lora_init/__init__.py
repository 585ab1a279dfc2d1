"""The initialisations of LoRA's A and B: PEFT's `init_lora_weights`.

    random          true, gaussian, false, orthogonal                `low_rank.py`
    weight-driven   pissa, pissa_niter_N, olora, loftq               `weight_driven.py`: from the frozen kernel
    data-driven     eva, lora_ga                                     `data_driven.py`: from the statistics of `jaxpeft.calibration`

PiSSA, OLoRA, LoftQ and LoRA-GA begin with A·B ≠ 0 and adjust the frozen kernel (`Lora.adjust_base`).

As in PEFT, every initialisation but `false` gives an embedding A = 0 and B ~ N(0, 1), and its table is not adjusted. LoftQ on an
embedding is refused, because PEFT fails at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxpeft.adapters.base import Site, SiteParams, check_rank
from jaxpeft.adapters.lora_init.data_driven import eva, lora_ga
from jaxpeft.adapters.lora_init.options import DATA_DRIVEN, Options, check_start, full_options, pissa_rounds
from jaxpeft.adapters.lora_init.weight_driven import loftq, olora, pissa
from jaxpeft.adapters.low_rank import init_low_rank, orthogonal
from jaxpeft.errors import InputError, check_choice

__all__ = ["DATA_DRIVEN", "Options", "check_start", "full_options", "init_lora", "loftq", "pissa_rounds"]


def init_lora(
    rng: jax.Array,
    site: Site,
    rank: int,
    scaling: float,
    start: bool | str,
    kernel: Callable[[], jax.Array],
    *,
    options: Options | None = None,
    statistics: jax.Array | None = None,
) -> SiteParams:
    """`a: [d_in, rank]` and `b: [rank, d_out]` in fp32.

    Args:
        rng: key of the random values.
        site: the layer.
        rank: r, from 1 to the layer's width.
        scaling: s, the factor on A·B.
        start: PEFT's `init_lora_weights`.
        kernel: returns the frozen kernel `[d_in, d_out]` in fp32.
        options: options of the initialisation, if it has any: PEFT's `loftq_config` or `lora_ga_config`.
        statistics: measured at this layer: for `eva` components of its inputs `[d_in, rank]`, for `lora_ga` the gradient of its
            kernel `[d_in, d_out]`.

    Raises:
        InputError: if the initialisation cannot have this rank or scaling, or its statistics are missing or do not fit.
    """
    check_rank(rank, site)
    if site.kind == "embedding":
        if start == "loftq":
            raise InputError(
                f"init_lora_weights 'loftq' cannot initialise the embedding '{site.path}'; leave it out of target_modules"
            )
        return init_low_rank(rng, site, rank, start is not False)
    if start in (True, False, "gaussian"):
        return init_low_rank(rng, site, rank, start)  # type: ignore[arg-type]
    assert isinstance(start, str)
    if start == "orthogonal":
        return orthogonal(rng, site, rank)
    if start in DATA_DRIVEN:
        if statistics is None:
            raise InputError(
                f"init_lora_weights '{start}' needs statistics of data, and there are none of layer {site.path}: "
                "give init_adapters(statistics=…) the statistics that jaxpeft.calibration.calibrate returns"
            )
        check_choice("init_lora_weights", start, ("eva", "lora_ga"))
        if start == "eva":
            return eva(statistics, site, rank)
        return lora_ga(
            rng, np.asarray(statistics), site, rank, scaling, kernel, full_options("lora_ga_config", options)
        )
    weights: Any = np.asarray(kernel())
    if start == "olora":
        return olora(weights, rank)
    if start == "loftq":
        return loftq(weights, rank, full_options("loftq_config", options))[1]
    return pissa(rng, weights, rank, scaling, pissa_rounds(start))
