"""The preflight command: starts the process that compiles, and prints what it found."""

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

# JAX_PLATFORMS: nothing here may start a TPU; the compiler needs none. TPU_SKIP_MDS_QUERY: nor ask Google's metadata server.
# ALLOW_MULTIPLE_LIBTPU_LOAD: libtpu locks itself against a second process, for the sake of a TPU that is not there.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


def run(config: RunConfig, topology: str, *, largest_batch: bool, every_bucket: bool) -> bool:
    """Print the report of `config` on `topology`; return whether it fits.

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
        InputError: without libtpu, for an unknown topology, a batch that cannot be split over its chips, or a run that cannot be
            made.
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
        # XLA_FLAGS are meant for the devices of this machine.
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | _ENVIRONMENT
        command = [sys.executable, "-m", "jaxpeft.preflight.child", str(folder / "request.json")]
        with (folder / "errors.txt").open("w+") as errors:
            # Kept from the reader: libtpu complains that there is no TPU.
            status = subprocess.run(command, env=environment, stderr=errors, check=False).returncode
            errors.seek(0)
            said = errors.read()
        if status:
            sys.stderr.write(said)
            raise RuntimeError(f"the compiling process ended with status {status}; what it said is above")
        answer = json.loads((folder / "answer.json").read_text())
    if "error" in answer:
        raise InputError(answer["error"])
    return read_report(answer["report"])


def require_libtpu() -> None:
    """Raise InputError where there is no libtpu, with the way to get it."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named and not Path(named).is_file():
        raise InputError(f"TPU_LIBRARY_PATH is {named}, and there is no such file; unset it or name libtpu.so")
    if not named and importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu is not installed here: on Linux (x86-64), make an environment of its own with python -m venv tpu-preflight, "
            "install with tpu-preflight/bin/pip install -e '.[tpu-preflight]', and run tpu-preflight/bin/python -m jaxpeft preflight"
        )
