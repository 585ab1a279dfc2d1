"""The preflight command: start the process that compiles, and print its report."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jaxpeft.config import RunConfig
from jaxpeft.config.files import write_config
from jaxpeft.errors import InputError
from jaxpeft.preflight.chips import parse_topology
from jaxpeft.preflight.report import Report, lines, read_report
from jaxpeft.report.console import log

# JAX_PLATFORMS: the compiler needs no TPU, so none may be started. TPU_SKIP_MDS_QUERY: do not ask Google's metadata server.
# ALLOW_MULTIPLE_LIBTPU_LOAD: libtpu would lock out a second process to protect a TPU, but there is none.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def run(config: RunConfig, topology: str, *, largest_batch: bool, every_bucket: bool) -> bool:
    """Print the report of `config` on `topology`. Returns True if every program fits.

    Raises:
        InputError: as `compile_in_child`.
    """
    report = compile_in_child(config, topology, largest_batch=largest_batch, every_bucket=every_bucket)
    log("")
    for line in lines(report):
        log(line)
    return report.fits


def compile_in_child(
    config: RunConfig,
    topology: str,
    *,
    largest_batch: bool,
    every_bucket: bool = False,
    kinds: Sequence[str] = ("training", "evaluation"),
) -> Report:
    """Compile the run's steps of `kinds` for `topology` in a process of its own.

    Raises:
        InputError: libtpu is missing, the topology is unknown, a batch cannot be split over its chips, or the run is invalid.
    """
    parse_topology(topology)
    require_libtpu()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_config(config.resolved(), folder / "config.yaml")
        request = {
            "config": str(folder / "config.yaml"),
            "topology": topology,
            "largest_batch": largest_batch,
            "every_bucket": every_bucket,
            "kinds": list(kinds),
        }
        (folder / "request.json").write_text(json.dumps(request))
        # Without XLA_FLAGS, which are meant for the devices of this machine.
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | _ENVIRONMENT
        command = [sys.executable, "-m", "jaxpeft.preflight.child", str(folder / "request.json")]
        with (folder / "errors.txt").open("w+") as errors:
            # Hidden from the user, because libtpu complains that there is no TPU.
            status = subprocess.run(command, env=environment, stderr=errors, check=False).returncode
            errors.seek(0)
            said = errors.read()
        if status:
            sys.stderr.write(said)
            raise RuntimeError(f"the compiling process ended with status {status}; its output is above")
        answer = json.loads((folder / "answer.json").read_text())
    if "error" in answer:
        raise InputError(answer["error"])
    return read_report(answer["report"])


def require_libtpu() -> None:
    """Raise InputError if libtpu is not installed. The message says how to install it."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named and not Path(named).is_file():
        raise InputError(f"TPU_LIBRARY_PATH is {named}, but there is no such file; unset it or name libtpu.so")
    if not named and importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu is not installed: on Linux (x86-64), make a separate environment with python -m venv tpu-preflight, "
            "install with tpu-preflight/bin/pip install -e '.[tpu-preflight]', and run tpu-preflight/bin/python -m jaxpeft preflight"
        )
