import os

# Before jax is imported: four devices, so that splitting a batch is tested everywhere, and no accelerator, so that
# equality bit for bit means the same on every machine.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
import tiny

# A silent promotion is how an fp32 adapter turns a bf16 model into an fp32 one. Ranks are not checked: Flax BERT itself
# fails under jax_numpy_rank_promotion=raise.
jax.config.update("jax_numpy_dtype_promotion", "strict")


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
