"""BERT-base's whole encoder in 4 bits: the bytes alive, and the most the process ever held on the way there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

LAYERS, HIDDEN, INTERMEDIATE = 12, 768, 3072
LINEAR_WEIGHTS = LAYERS * (4 * HIDDEN**2 + 2 * HIDDEN * INTERMEDIATE)  # 84.9 million
# The vocabulary is small, for embeddings stay in full precision: here nearly all that could be too large is kernels.
CONFIG = {"model_type": "bert", "vocab_size": 1000, "architectures": ["BertModel"]}
MEGABYTE = 1_000_000

# Resident memory now (VmRSS) or at its highest (VmHWM). Not getrusage's ru_maxrss: a process inherits that of whoever
# started it, here of a pytest with torch in it.
MEMORY = """
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
"""
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc"
)

# Loads a model, and prints what was alive before, what is alive, and how far the resident memory rose above its start.
MEASURE = """
import gc, json, sys
import jax
from jaxpeft import Quantization, load_model
from jaxpeft.trees import leaf_paths
from jaxpeft.quantization import is_quantized


small, large = sys.argv[1:]
load_model(small, "classification", quantization=Quantization())  # everything is imported and compiled
gc.collect()
before = {id(array) for array in jax.live_arrays()}
start = memory("VmRSS")
model = load_model(large, "classification", quantization=Quantization())
peak = memory("VmHWM")
gc.collect()
leaves = leaf_paths(model.params)
kernels = [leaf for path, leaf in leaves.items() if "/encoder/" in path and is_quantized(leaf)]
mine = {id(array) for array in jax.tree.leaves(kernels)}
alive = {id(array): array for array in jax.live_arrays() if id(array) not in before}
print(json.dumps({
    "weights": sum(kernel.size for kernel in kernels),
    "live_kernel_bytes": sum(array.nbytes for key, array in alive.items() if key in mine),
    "live_bytes": sum(array.nbytes for array in alive.values()),
    "expected_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(leaves)),
    "risen": peak - start,
}))
"""


def write(directory, **config):
    """A random BERT encoder; every parameter is cut from one block of noise, which takes no time."""
    values = {**CONFIG, **config}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, **values}
    noise = np.random.default_rng(0).standard_normal(sizes["hidden_size"] * max(sizes["intermediate_size"], 1000))
    noise = (noise * 0.02).astype(np.float32)
    return tiny.write_encoder(directory, values, lambda name, shape: noise[: np.prod(shape)].reshape(shape))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny encoder and BERT-base's, in full precision."""
    root = tmp_path_factory.mktemp("bases")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return write(root / "small", **small), write(root / "large")


def python(code, *args):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY + code, *map(str, args)],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},  # programs read from files take memory too
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bound(stays):
    """Bytes the process may rise by: what stays and, for one leaf at a time, the mapped file, the array, its transpose and a
    copy to the device; with 32 MB for numpy's and XLA's own. 119 MB here, where the kernels alone are 340 in fp32."""
    return stays + 4 * (4 * HIDDEN * INTERMEDIATE) + 32 * MEGABYTE


@pytest.mark.slow
def test_loading_bert_base_in_4_bits(bases):
    found = json.loads(python(MEASURE, *bases))
    assert found["weights"] == LINEAR_WEIGHTS
    assert found["live_kernel_bytes"] * 8 / LINEAR_WEIGHTS <= 4.2
    assert found["live_bytes"] == found["expected_bytes"]  # nothing else stayed: no copy of a kernel in full
    assert found["risen"] <= bound(found["expected_bytes"]) < 4 * LINEAR_WEIGHTS / 2


# The command on a tiny model, then on the large one; then what it wrote is loaded, as it is.
QUANTIZE = """
import sys
import jax
from jaxpeft import load_model
from jaxpeft.cli import main


main(["quantize", sys.argv[1], sys.argv[3] + "-small"])
start = memory("VmRSS")
main(["quantize", sys.argv[2], sys.argv[3]])
model = load_model(sys.argv[3], "classification")
held = sum(array.nbytes for array in jax.live_arrays())
print(held, memory("VmHWM") - start)
"""


@pytest.mark.slow
def test_writing_bert_base_in_4_bits_and_loading_that(bases, tmp_path):
    *_, printed, _, _, measured = python(QUANTIZE, *bases, tmp_path / "quantized").splitlines()
    assert printed.startswith(
        "73 linear layers in nf4 in blocks of 64 with double quantisation: 342.1 MB in float32 → "
    )
    assert printed.endswith(" 4.127 bits a weight")
    held, risen = map(int, measured.split())
    file_bytes = (tmp_path / "quantized" / "model.safetensors").stat().st_size
    assert abs(held - file_bytes) < MEGABYTE  # the file's own, and a new head
    assert risen <= bound(file_bytes) < 4 * LINEAR_WEIGHTS / 2
