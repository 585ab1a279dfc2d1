"""One training step of a method on the device, against the same step on the CPU. Imports jax.

Both start from the same values, in which no adapter is a no-op, and the optimizer is plain gradient descent: so the change of the trained
parameters is their gradient. (Adam's first change is the gradient's sign, which rounding decides where a gradient is near zero.) There is
no dropout. An error is the norm of the difference over the norm of the CPU's change in fp32, over all trained parameters together.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.gpu.steps import checked_case
from benchmarks.speed.configuration import run_config
from jaxpeft.runs.setup import setup_run
from jaxpeft.training.step import make_train_step

FP32_ERROR = 1e-4
"""The most that a step in fp32 may differ from the CPU's, with matrix products in full fp32 (`jax_default_matmul_precision`)."""

BF16_TIMES, BF16_SLACK = 3.0, 1e-3
"""A step in bf16 may be so many times as far from the CPU's step in fp32 as the CPU's own step in bf16 is, and a little more."""

DTYPES = ("float32", "bfloat16")


def check_method(method: str, workload: Path) -> dict[str, Any]:
    """Return the errors of a step of `method` in fp32 and bf16, the losses, and `wrong`: "" or which error is too large.

    `workload` is the folder that `benchmarks.speed.workload` wrote for `checked_case`.
    """
    places = {"cpu": jax.devices("cpu")[0], "device": jax.devices()[0]}
    steps, arguments = {}, {}
    for dtype in DTYPES:
        step, state, frozen, batch = _made_ready(method, dtype, workload)
        for place, device in places.items():
            arguments[dtype, place] = jax.device_put(
                (state, frozen, batch), device, may_alias=False
            )  # the step consumes them
            steps[dtype, place] = step.lower(*arguments[dtype, place])
    with ThreadPoolExecutor() as pool:  # compiling is most of the time
        compiled = dict(zip(steps, pool.map(lambda lowered: lowered.compile(), steps.values()), strict=True))
    changes, losses = {}, {}
    for key, program in compiled.items():
        before = _leaves(arguments[key][0].adapters)
        after, metrics = program(*arguments[key])
        changes[key] = [a - b for a, b in zip(_leaves(after.adapters), before, strict=True)]
        losses[key] = float(metrics["loss"])
    return {
        **judge(*(_error(changes[key], changes["float32", "cpu"]) for key in steps if key != ("float32", "cpu"))),
        "losses": {" on the ".join(key): loss for key, loss in losses.items()},
    }


def judge(fp32: float, bf16_cpu: float, bf16: float) -> dict[str, Any]:
    """The verdict on the errors of the device in fp32, the CPU in bf16, and the device in bf16; `wrong` is "" if it is good."""
    allowed = BF16_TIMES * bf16_cpu + BF16_SLACK
    wrong = [
        f"{dtype}: {error:.2e} from the CPU's step in fp32, where {limit:.2e} is allowed"
        for dtype, error, limit in (("float32", fp32, FP32_ERROR), ("bfloat16", bf16, allowed))
        if not error <= limit  # NaN is wrong
    ]
    errors = {"float32": fp32, "bfloat16": bf16, "bfloat16 on the CPU": bf16_cpu}
    return {"errors": {name: float(f"{error:.3g}") for name, error in errors.items()}, "wrong": "; ".join(wrong)}


def _made_ready(method: str, dtype: str, workload: Path) -> tuple[Any, Any, Any, Any]:
    """The step of `method`, its state, the frozen parameters and a batch."""
    parts = setup_run(run_config(checked_case(dtype), method, workload))
    state, descent = parts.initial_state(), optax.with_extra_args_support(optax.sgd(1.0))
    draw = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + 0.02 * draw.standard_normal(x.shape).astype(x.dtype), state.adapters)
    state = replace(state, adapters=adapters, opt_state=descent.init(adapters))
    step = make_train_step(parts.objective, descent, allocation=parts.plan.allocation)
    return step, state, parts.frozen, dict(np.load(workload / "check.npz"))


def _leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _error(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    squares = sum(float(((a - b) ** 2).sum()) for a, b in zip(found, expected, strict=True))
    return (squares / sum(float((b**2).sum()) for b in expected)) ** 0.5
