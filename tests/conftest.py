import atexit
import contextlib
import functools
import gc
import os
import shutil
import tempfile
import traceback
from pathlib import Path

from compiling import COMPILE_FAST

# Before jax is imported: four devices, so that splitting a batch is tested everywhere, and no accelerator, so that
# equality bit for bit means the same on every machine.
FLAGS = ("--xla_force_host_platform_device_count=4", COMPILE_FAST)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# Where a line of Python stands in a program helps nobody here, and costs a tenth of tracing and compiling.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Not the user's compiled programs, but the session's own: its workers and the processes they start compile nothing twice.
# Tests about compiling ask for `compiled_afresh`.
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the directory
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxpeft-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    # Nor the user's tokens; but what is not ours stays where it is.
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("HF_HOME", str(caches / "huggingface"))
    os.environ.setdefault("MPLCONFIGDIR", str(caches / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxpeft-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Tracing makes objects by the million that stay: looking through all of them again and again took 3 % of the time.
gc.set_threshold(100_000, 50, 100)
# As many workers as cores: threads of torch's own would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

PACKAGE = Path(__file__).resolve().parents[1] / "jaxpeft"
TORCH_SIDE = ("torch", "peft", "bitsandbytes", "accelerate", "sentence_transformers")

# A silent promotion is how an fp32 adapter turns a bf16 model into an fp32 one. Ranks are not checked: Flax BERT itself
# fails under jax_numpy_rank_promotion=raise.
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the markers
def pytest_collection_modifyitems(items):
    """With `--dist loadgroup`, a file's tests go to one worker, for they share fixtures; but where a test names a group.

    The groups that are named go first: they take longest, and nobody should wait for them at the end.
    """
    named = []
    for item in items:
        if group := item.get_closest_marker("xdist_group"):
            named.append((group.args[0], item))
        else:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    first = dict.fromkeys(group for group, _ in named)
    items[:] = [
        *(item for group in first for name, item in named if name == group),
        *(item for item in items if item not in {item for _, item in named}),
    ]


def pytest_collection_finish(session):
    """Stop where xdist and pytest do not fit together: a group's tests would run on any worker, and share nothing."""
    grouped = session.config.getoption("loadgroup", False)
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            f"pytest {pytest.__version__} does not keep the groups of pytest-xdist: pip install 'pytest<9.2'"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with skipping_without_torch():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with skipping_without_torch():
        return (yield)


@contextlib.contextmanager
def skipping_without_torch():
    """Skip what compares with torch where it is not installed; but not if our own code asked for it."""
    try:
        yield
    except ImportError as error:
        files = {Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)}
        # A torch class of transformers imports without torch, and says at its first use that torch is missing.
        needs_torch = error.name in TORCH_SIDE or "requires the PyTorch library" in str(error)
        if not needs_torch or any(PACKAGE in file.parents for file in files):
            raise
        pytest.skip(f"needs {error.name or 'torch'}: pip install -e '.[test]'")


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
def compiled_afresh():
    """For tests about compiling: XLA's account of a program (its memory, its text) is lost when it is read from a file."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks once whether there is one
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


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
