"""One step in a process of its own: python -m benchmarks.gpu.work STEP SETTINGS_AS_JSON RESULT

writes `{"result": …, "skipped": why or "", "wrong": what failed or ""}` to the file RESULT, after each part of the step that is done. So
a step that is stopped leaves what it has.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import STEPS, TESTS, Step, case_of, checked_case
from benchmarks.speed.cases import peft_variants
from benchmarks.speed.machine import measured_now
from benchmarks.speed.record import row, summary
from benchmarks.speed.rounds import ROOT, Paths, Runner, RunnerError, compare, measure_peaks, write_workload

Settings = dict[str, Any]
Keep = Callable[..., None]
"""`(result, wrong="")` writes the result so far, and what failed beside it."""

IN_JAXPEFT = ("correctness", "together", "tests")
"""Kinds that import jaxpeft in this process, which then has the packages of jaxpeft's side."""


_COMPILES_TINY = "bert-base-128"


class Skipped(Exception):
    """The machine lacks something that the step needs. The message says what, and the way out."""


def paths_of(settings: Settings) -> Paths:
    """Where each side's packages are, and the programs that jax has compiled: steps share them."""
    return Paths(settings["ours"], settings["theirs"], str(Path(settings["folder"]) / "programs"))


def environment(step: Step, settings: Settings) -> dict[str, str]:
    """The environment of a step's process. Several processes share the GPU's memory, so none reserves it."""
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    own = paths_of(settings).environment("ours") if step.kind in IN_JAXPEFT else os.environ
    # Without it a GPU rounds the factors of an fp32 product to TF32, and a CPU does not.
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} if step.kind in ("correctness", "tests") else {}
    return {**own, **memory, **exact}


def peaks(step: Step, settings: Settings, keep: Keep) -> None:
    """The rates of matrix products in bf16."""
    sides = ["ours", *([] if settings["no_peft"] else ["theirs"])]
    sizes = [(256, 256, 256)] if settings["tiny"] else None
    keep(measure_peaks({"bfloat16"}, settings["device"], paths_of(settings), sizes=sizes, sides=sides))


def speed(step: Step, settings: Settings, keep: Keep) -> None:
    """A row of the record for each method of a case, torch PEFT's variants beside it, all in the same rounds."""
    case, paths = case_of(step, tiny=settings["tiny"]), paths_of(settings)
    data = Path(settings["data"])
    if case.task == "classification" and not data.is_file():
        raise Skipped(f"--data {data} is not a file; give SST-2's whole sentences")
    workload = Path(settings["folder"]) / case.name
    if not (workload / "check.npz").is_file():  # written last
        workload.mkdir(exist_ok=True)
        write_workload(case, data, workload, paths)
    offered = {method: _offered(step, method, settings, paths) for method in step.methods}
    failed = ""
    while True:
        runners = [] if "lora" in step.methods else [Runner("lora")]
        for method, variants in offered.items():
            runners += [Runner(method), *(Runner(method, name) for name, missing in variants.items() if not missing)]
        try:
            timings = compare(case, runners, rounds=settings["rounds"], workload=workload, paths=paths, count=False)
            break
        except RunnerError as error:
            # Without the variant of PEFT that fails, the others are still worth measuring.
            if not error.runner.variant:
                raise
            why = f"it failed: {str(error).strip().splitlines()[-1]}"
            offered[error.runner.method][error.runner.variant] = why
            failed += f"{error.runner.method}, PEFT {error.runner.variant}: {why}\n"
    config = json.loads((workload / "model" / "config.json").read_text())
    measured = {**measured_now(), "rounds": settings["rounds"], "peak": settings["peak"]}
    rows = {m: row(case, m, timings, config, offered=offered[m], measured=measured) for m in step.methods}
    for method, found in rows.items():
        print(summary(case.name, method, found), flush=True)
    keep({case.name: rows}, failed)


def _offered(step: Step, method: str, settings: Settings, paths: Paths) -> dict[str, str]:
    """The variants of PEFT for `method`: name → "", or the reason why it is not measured."""
    case = case_of(step, tiny=False)
    offered = {n: why for n, why in peft_variants(case, method, settings["device"]).items() if n in step.variants}
    missing = settings["no_peft"]
    if not missing and method == "qlora" and absent(("bitsandbytes",), paths.environment("theirs")):
        missing = "bitsandbytes is not installed on torch PEFT's side"
    found = {name: why or missing for name, why in offered.items()}
    if settings["tiny"] and "compile" in found and step.name != _COMPILES_TINY:
        found["compile"] = f"--tiny tries torch.compile only in the step {_COMPILES_TINY!r}"
    return found


def absent(modules: tuple[str, ...], env: dict[str, str]) -> list[str]:
    """Those of `modules` that a process with the environment `env` cannot find."""
    code = "import sys, importlib.util as u; print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
    command = [sys.executable, "-c", code, *modules]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


def correctness(step: Step, settings: Settings, keep: Keep) -> None:
    """One training step of each method on the device against the CPU's, in fp32 and bf16."""
    from benchmarks.gpu.correctness import check_method
    from benchmarks.speed.workload import write_workload as write_here

    workload = Path(settings["folder"]) / "correctness"
    if not (workload / "check.npz").is_file():
        workload.mkdir(exist_ok=True)
        write_here(checked_case("float32"), Path(), workload)
    found: dict[str, Any] = {}
    for method in step.methods[: 3 if settings["tiny"] else None]:
        found[method] = check_method(method, workload)
        keep(found)
        print(f"{method}: {found[method]['wrong'] or found[method]['errors']}", flush=True)


def together(step: Step, settings: Settings, keep: Keep) -> None:
    """Eight runs in one program against one run after the other: MiniLM, 16 × 128, bf16."""
    from benchmarks.together import measure

    length, members, steps = (8, 2, 1) if settings["tiny"] else (128, 8, 50)
    keep(measure(length, [members], steps, settings["rounds"], dtype="bfloat16")[0])


def tests(step: Step, settings: Settings, keep: Keep) -> None:
    """The chex tests of the adapters' mathematics, on the device."""
    if missing := [name for name in ("pytest", "xdist", "chex") if importlib.util.find_spec(name) is None]:
        raise Skipped(
            f"{', '.join(missing)} not installed; put wheels of pytest, pytest-xdist and chex into --jaxpeft_pythonpath"
        )
    chosen = ["-n", "0", "-k", "lora and fp32"] if settings["tiny"] else ["-n", str(min(8, os.cpu_count() or 1))]
    files = [str(ROOT / "tests" / name) for name in TESTS]
    platforms = {} if settings["device"] == "cpu" else {"JAX_PLATFORMS": "cuda,cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--tb=line", "-p", "no:cacheprovider", *chosen, *files],
        env={**os.environ, **platforms},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = run.stdout.strip().splitlines() or run.stderr.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    wrong = "" if run.returncode == 0 else f"pytest ended with status {run.returncode}: {lines[-1]}"
    print(lines[-1], flush=True)
    keep({"summary": lines[-1], "failed": failed, "wrong": wrong})


def wrong_in(result: dict[str, Any]) -> str:
    """What a result itself calls wrong, by part; "" if nothing."""
    parts = {"": result, **result}
    found = {name: part["wrong"] for name, part in parts.items() if isinstance(part, dict) and part.get("wrong")}
    return "; ".join(f"{name} {what}".strip() for name, what in found.items())


def main(name: str, settings: Settings, file: Path) -> None:
    """Do the step `name`."""
    (step,) = (step for step in STEPS if step.name == name)

    def keep(result: dict[str, Any], wrong: str = "", skipped: str = "") -> None:
        file.write_text(json.dumps({"result": result, "skipped": skipped, "wrong": wrong.strip() or wrong_in(result)}))

    try:
        {"peaks": peaks, "speed": speed, "correctness": correctness, "together": together, "tests": tests}[step.kind](
            step, settings, keep
        )
    except Skipped as why:
        keep({}, skipped=str(why))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
