"""LoRA's starts on one matrix: values worked out by hand, what chance may choose, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft import InputError, Lora
from jaxpeft.adapters import AdaLora, Hira, Site, Vera
from jaxpeft.adapters.lora_init.weight_driven import randomized_svd


def test_random_directions_of_lora_ga_are_of_the_first_2_r():
    gradient = jnp.asarray(tiny.normal(0, 24, 16))
    method = Lora(4, 4.0, init_lora_weights="lora_ga", lora_ga_config={"direction": "random", "scale": "unit"})
    site = Site("layer", 24, 16)
    u, s, _ = np.linalg.svd(gradient)
    drawn = set()
    for seed in range(20):
        params = method.init_from(gradient, jax.random.key(seed), site, lambda: jnp.zeros((24, 16)))
        overlap = np.abs(u[:, :8].T @ np.asarray(params["a"]))
        which = overlap.argmax(axis=0)
        np.testing.assert_allclose(overlap.max(axis=0), 1, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(params["b"], axis=1), s[which], rtol=1e-5)
        assert len(set(which)) == 4
        drawn |= set(which)
    assert drawn == set(range(8))


@pytest.fixture
def falling():
    """A kernel, 96 × 64, whose spectrum falls, as those of trained ones do."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 64)))[0] for n in (96, 64))
    return ((u * 0.8 ** np.arange(64)) @ v.T).astype(np.float32)


def test_the_fast_pissa_is_close_to_the_exact_one(falling):
    kernel, site = falling, Site("layer", 96, 64)

    def start(name):
        method = Lora(8, 16.0, init_lora_weights=name)
        params = method.init(jax.random.key(0), site, lambda: jnp.asarray(kernel))
        return np.asarray(params["a"] @ params["b"] * method.scaling)

    exact = start("pissa")
    errors = [np.linalg.norm(start(f"pissa_niter_{n}") - exact) / np.linalg.norm(exact) for n in (0, 2, 16)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_given_the_same_draw_torch_finds_the_same(falling):
    """On kernels both taller and wider than the draw."""
    import torch

    for matrix in (falling, falling.T):
        torch.manual_seed(1)
        sketch = torch.randn(64, 8).numpy()
        torch.manual_seed(1)
        u, s, v = (tensor.numpy() for tensor in torch.svd_lowrank(torch.tensor(matrix), 8, niter=2))
        ours = randomized_svd(matrix, sketch, 2)
        np.testing.assert_allclose(ours[1], s, rtol=1e-5)
        np.testing.assert_allclose((ours[0] * ours[1]) @ ours[2], (u * s) @ v.T, atol=1e-5)


def test_b_s_bias_starts_at_zero_and_is_drawn_without_a_start():
    """Uniform on ±1/√rank, as torch's linear layer draws it."""
    site = Site("layer", 4, 100_000)
    kernel = lambda: jnp.zeros((4, 100_000))  # noqa: E731
    assert not Lora(4, lora_bias=True).init(jax.random.key(0), site, kernel)["bias"].any()
    drawn = np.asarray(Lora(4, lora_bias=True, init_lora_weights=False).init(jax.random.key(0), site, kernel)["bias"])
    assert 0.4999 < np.abs(drawn).max() <= 0.5
    assert abs(drawn.var() / (0.25 / 3) - 1) < 0.01


SITE = Site("layer", 32, 16)
REFUSED = {
    "corda": (
        lambda: Lora(init_lora_weights="corda"),
        "'corda' is not supported; known: true, false, gaussian, .*lora_ga",
    ),
    "near": (lambda: Lora(init_lora_weights="pisa"), "did you mean"),
    "niter": (lambda: Lora(init_lora_weights="pissa_niter_x"), "pissa_niter_x.* pissa_niter_N"),
    "bias": (lambda: Lora(init_lora_weights="pissa", lora_bias=True), "lora_bias needs .*true or false"),
    "bits": (lambda: Lora(loftq_config={"loftq_bits": 2}), "loftq_config.loftq_bits must be 4 or 8; got 2"),
    "rounds": (lambda: Lora(loftq_config={"loftq_iter": 0}), "loftq_iter must be a whole number of at least 1; got 0"),
    "rho": (lambda: Lora(eva_config={"rho": 0.5}), "rho must be at least 1; got 0.5"),
    "direction": (lambda: Lora(lora_ga_config={"direction": "BrAr"}), "direction must be one of ArBr, .*; got 'BrAr'"),
    "option": (
        lambda: Lora(eva_config={"whitten": True}),
        "eva_config has no option 'whitten'; known: rho.*did you mean",
    ),
    "type": (lambda: Lora(eva_config={"whiten": "yes"}), "whiten must be a bool; got 'yes'"),
    "odd": (lambda: start(Lora(3, init_lora_weights="orthogonal")), "give an even rank, not 3"),
    "alpha": (lambda: start(Lora(4, -1.0, init_lora_weights="pissa")), "is -0.25; give a positive alpha"),
    "rank": (lambda: start(Lora(17, init_lora_weights="olora")), "rank 17 is outside 1 to 16"),
    "evidence": (
        lambda: start(Lora(4, init_lora_weights="eva")),
        "needs statistics of data, and there are none of layer layer.*calibrate",
    ),
    "no-evidence": (lambda: start(Lora(4), jnp.zeros((32, 4))), "lora is not initialised from data"),
    "components": (lambda: start(Lora(4, init_lora_weights="eva"), jnp.zeros((32, 5))), r"shape \[32, 5\].*\[32, 4\]"),
    "gradient": (
        lambda: start(Lora(4, init_lora_weights="lora_ga"), jnp.zeros((16, 32))),
        r"shape \[16, 32\].*\[32, 16\]",
    ),
    "half": (lambda: start(Lora(9, init_lora_weights="lora_ga"), jnp.ones((32, 16))), "at most 8, not 9"),
    "embedding": (
        lambda: Lora(4, init_lora_weights="loftq").init(jax.random.key(0), Site("e", 99, 32, "embedding"), jnp.zeros),
        "'loftq' cannot initialise the embedding 'e'",
    ),
}


def start(method, statistics=None):
    kernel = jnp.asarray(tiny.normal(0, 32, 16))
    if statistics is None:
        return method.init(jax.random.key(0), SITE, lambda: kernel)
    return method.init_from(statistics, jax.random.key(0), SITE, lambda: kernel)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_start_can_be_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_values_worked_out_by_hand():
    """W = diag(4, 2, 1): its singular vectors are the axes, and with s = 2 the share of the first is 4/2."""
    kernel = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
    site = Site("layer", 3, 3)

    def product(method, statistics=None):
        make = method.init if statistics is None else lambda *args: method.init_from(statistics, *args)
        params = make(jax.random.key(0), site, lambda: kernel)
        return params, np.asarray(method.adjust_base(kernel, params))

    params, left = product(Lora(1, 2.0, init_lora_weights="pissa"))
    np.testing.assert_allclose(np.abs(params["a"][:, 0]), [2**0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(left, np.diag([0.0, 2, 1]), atol=1e-6)
    # OLoRA: Q is a sign, B one unit vector, A a row of R; s is not divided out.
    params, left = product(Lora(1, 2.0, init_lora_weights="olora"))
    np.testing.assert_allclose(np.abs(params["a"][:, 0]), [4, 0, 0], atol=1e-6)
    np.testing.assert_allclose(left, np.diag([-4.0, 2, 1]), atol=1e-6)
    # LoftQ: the block's absmax is 4; 2/4 and 1/4 become NF4's 0.4407 and 0.2461; the largest error is the first of the two.
    params, left = product(Lora(1, 1.0, init_lora_weights="loftq"))
    np.testing.assert_allclose(np.diag(left), 4 * np.array([1, 0.44070982933044434, 0.24611230194568634]), rtol=1e-6)
    np.testing.assert_allclose(params["a"] @ params["b"], np.diag([0, 2 - 4 * 0.44070982933044434, 0]), atol=1e-6)
    # LoRA-GA: A takes the gradient's first direction, B the second with its size 2, times 3^¼ / √16.
    params, left = product(Lora(1, 1.0, init_lora_weights="lora_ga"), jnp.diag(jnp.array([3.0, 2.0, 1.0])))
    np.testing.assert_allclose(np.abs(params["a"][:, 0]), [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(np.abs(params["b"][0]), [0, 2 * 3**0.25 / 4, 0], atol=1e-6)
    np.testing.assert_allclose(np.abs(kernel - left)[0], [0, 2 * 3**0.25 / 4, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("direction", "of_a", "of_b"), [("ArB2r", [0, 1], [2, 3]), ("A2rBr", [2, 3], [0, 1]), ("ArBr", [1, 3], [0, 2])]
)
@pytest.mark.parametrize(
    ("scale", "times_a", "times_b"),
    # The kernel's largest singular value is 5 and the gradient's are 8, 4, 2, 1; s = 6/2 = 3; gamma = 16, and 4 outputs.
    [("unit", 1, 1), ("stable", 1, 4**0.25 / 4), ("gd_scale", 1 / 3, 1 / 3), ("weight_svd", 1, None)],
)
def test_which_directions_lora_ga_takes_and_how_large(direction, of_a, of_b, scale, times_a, times_b):
    sizes = np.array([8.0, 4.0, 2.0, 1.0])
    gradient = jnp.zeros((6, 4)).at[jnp.arange(4), jnp.arange(4)].set(sizes)
    method = Lora(2, 6.0, init_lora_weights="lora_ga", lora_ga_config={"direction": direction, "scale": scale})
    kernel = 5 * jnp.eye(6, 4)
    params = method.init_from(gradient, jax.random.key(0), Site("layer", 6, 4), lambda: kernel)
    times_b = 5 / sizes[of_b[0]] if times_b is None else times_b
    np.testing.assert_allclose(np.abs(params["a"]), times_a * np.eye(6)[:, of_a], atol=1e-5)
    np.testing.assert_allclose(np.abs(params["b"]), times_b * np.diag(sizes)[of_b], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_at_full_rank_repairs_what_rounding_took(bits):
    kernel = jnp.asarray(tiny.normal(0, 32, 16))
    method = Lora(16, 16.0, init_lora_weights="loftq", loftq_config={"loftq_bits": bits})
    params = method.init(jax.random.key(0), SITE, lambda: kernel)
    left = method.adjust_base(kernel, params)
    step = float(jnp.abs(kernel).max()) * {4: 0.16, 8: 0.5 / 127}[bits]  # half of the codes' largest distance
    assert 0 < float(jnp.abs(left - kernel).max()) <= step * 1.001
    np.testing.assert_allclose(method.kernel(left, params), kernel, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        Lora(4, init_lora_weights=False),
        Hira(4, init_weights=False),
        AdaLora(init_r=4, target_r=2, init_lora_weights=False),
        Vera(4, init_weights=False),
    ],
    ids=lambda method: method.name,
)
def test_without_a_start_nothing_is_zero(method):
    """So that a test of a fresh adapter sees all of it."""
    params = method.init(jax.random.key(0), SITE, lambda: jnp.asarray(tiny.normal(0, 32, 16)))
    assert {name: leaf.shape for name, leaf in params.items()} == method.shapes(SITE)
    assert all(np.abs(leaf).min() > 0 for leaf in params.values())
