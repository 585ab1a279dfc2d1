"""What a new method inherits from the contract in `adapters/base.py`, and what the contract refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toy_method import Toy

import jaxpeft.adapters
from jaxpeft import InputError, Lora
from jaxpeft.adapters import Hira, ModifiesBase, SharesFactors, Site
from jaxpeft.adapters.base import SiteParams
from jaxpeft.adapters.build import checked_options, init_adapters, with_adjusted_base
from jaxpeft.quantization import quantize
from jaxpeft.trees import SHARED

SITE = Site("layer", 24, 16)
TARGETS = {SITE.path: SITE}
KERNEL = jnp.asarray(tiny.normal(0, 24, 16))
PARAMS = {"layer": {"kernel": KERNEL}}


@dataclass(frozen=True)
class StartsAtOnes(Toy, ModifiesBase):
    """The toy whose first product is not zero."""

    @property
    def modifies_base(self) -> bool:
        return True

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        return {"u": jnp.ones((site.d_in, 1)), "v": jnp.ones((1, site.d_out))}

    def adjust_base(self, frozen_kernel: jax.Array, start: SiteParams) -> jax.Array:
        return frozen_kernel - start["u"] @ start["v"]


@dataclass(frozen=True)
class SharesARow(Toy, SharesFactors):
    """The toy with a factor that its layers share."""

    def init_shared(self, rng: jax.Array, sites: Mapping[str, Site]) -> SiteParams:
        return {"row": jnp.ones((max(site.d_in for site in sites.values()),))}


def test_a_start_that_changes_the_output_is_taken_off_the_base():
    method = StartsAtOnes()
    frozen, adapters = init_adapters(PARAMS, method, TARGETS, rng=jax.random.key(0))
    whole = method.kernel(frozen["layer"]["kernel"], adapters["sites"]["layer"])
    np.testing.assert_allclose(whole, KERNEL, atol=1e-6)
    # A file that is loaded makes the same base again.
    chex.assert_trees_all_equal(with_adjusted_base(PARAMS, method, TARGETS), frozen)


def test_a_start_that_is_part_of_the_base_needs_its_full_precision():
    params = {"layer": {"kernel": quantize(np.asarray(KERNEL), data_type="nf4")}}
    with pytest.raises(
        InputError, match="layer layer is stored quantised, and this initialisation of toy-rank-one needs"
    ):
        init_adapters(params, StartsAtOnes(), TARGETS, rng=jax.random.key(0))


@pytest.mark.parametrize("method", [Toy(), StartsAtOnes()], ids=["plain", "modifies the base"])
def test_statistics_for_a_method_that_does_not_use_data(method):
    with pytest.raises(
        InputError, match="toy-rank-one is not initialised from data: leave out the calibration statistics"
    ):
        init_adapters(PARAMS, method, TARGETS, rng=jax.random.key(0), statistics={"layer": jnp.ones((4, 24))})


def test_shared_factors_are_frozen_and_saved():
    method = SharesARow()
    frozen, _ = init_adapters(PARAMS, method, TARGETS, rng=jax.random.key(0))
    chex.assert_trees_all_equal(frozen[SHARED], {"row": jnp.ones((24,))})
    assert method.shared_shapes(TARGETS) == {"row": (24,)}
    assert method.saves_shared


def test_options_of_a_new_method_are_checked_by_its_defaults():
    given = {"gamma": 2, "marks": ["x", "y"]}
    assert checked_options(Toy, given, "here") == {"gamma": 2, "marks": ("x", "y")}
    with pytest.raises(InputError, match=r"^here: the method toy-rank-one has no option 'gama'; did you mean 'gamma'"):
        checked_options(Toy, {"gama": 2.0}, "here")
    with pytest.raises(InputError, match=r"^here: gamma of toy-rank-one must be a float; got True"):
        checked_options(Toy, {"gamma": True}, "here")


def test_an_embedding_without_a_start_is_drawn_whole():
    site = Site("table", 24, 16, kind="embedding")
    params = Lora(4, 8.0, init_lora_weights=False).init(jax.random.key(0), site, lambda: KERNEL)
    assert all(np.abs(leaf).min() > 0 for leaf in params.values())
    plain = Lora(4, 8.0).init(jax.random.key(0), site, lambda: KERNEL)
    assert not plain["a"].any()
    assert np.abs(plain["b"]).min() > 0


def test_an_unknown_start():
    with pytest.raises(InputError, match="unknown initialisation 'zeros'; it must be true, false or gaussian"):
        Hira(4, init_weights="zeros").init(jax.random.key(0), SITE, lambda: KERNEL)


def test_the_room_has_no_other_names():
    with pytest.raises(AttributeError, match=r"module 'jaxpeft\.adapters' has no attribute 'absent'"):
        _ = jaxpeft.adapters.absent
    assert dir(jaxpeft.adapters) == sorted(jaxpeft.adapters.__all__)
