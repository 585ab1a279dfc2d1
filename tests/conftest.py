import functools
import os

# Before jax is imported: four devices, so that splitting a batch is tested everywhere, and no accelerator, so that
# equality bit for bit means the same on every machine. Compiling is most of the suite's time, hence level 0.
FLAGS = ("--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nor the user's compiled programs: what is tested is compiled, but where a test says so (`tiny_runs.compiled_once`).
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

# A silent promotion is how an fp32 adapter turns a bf16 model into an fp32 one. Ranks are not checked: Flax BERT itself
# fails under jax_numpy_rank_promotion=raise.
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session", autouse=True)
def optax_may_promote():
    """optax 0.2.8 is not strict in two places: decay**count, a float and an integer, and grad / mini_step."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [(optax.tree, "bias_correction"), (optax.MultiSteps, "update")]:
            patch.setattr(owner, name, _promoting(getattr(owner, name)))
        yield


def _promoting(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


@pytest.fixture
def standard_promotion():
    """For whole models in bf16: transformers' Flax attention and Flax's LayerNorm mix bf16 and fp32 themselves."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A function `(model_type, task="masked-lm", **options) → Model`: tiny, random weights, loaded once a session."""
    return tiny.loader(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="session")
def bert(tiny_models):
    return tiny_models("bert")


@pytest.fixture(scope="session")
def distilbert(tiny_models):
    return tiny_models("distilbert")


@pytest.fixture(scope="session")
def roberta(tiny_models):
    return tiny_models("roberta")
