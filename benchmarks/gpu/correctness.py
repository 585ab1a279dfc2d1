"""One training step of a method on the device, against the same step on the CPU. Imports jax.

Both start from the same values, in which no adapter is a no-op, and the optimizer is plain gradient descent: so the change of the trained
parameters is their gradient. (Adam's first change is the gradient's sign, which rounding decides where a gradient is near zero.) There is
no dropout. An error is the larger of two: of the loss, relative to the CPU's; and of the change, the norm of the difference over the norm
of the CPU's, over all trained parameters together.
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

ERROR = {"float32": 1e-4, "bfloat16": 5e-2}
"""The most that a step may differ from the CPU's step in the same dtype.

In fp32, matrix products are computed in full (`jax_default_matmul_precision`). As a scale, tried on a CPU with nine methods: a relative
change of every frozen weight by one rounding of its dtype changes a step by up to 3e-5 in fp32, and 0.023 in bf16. AdaLoRA's step is mostly
its penalty, and changes by less than a hundredth of that.
"""


def check_method(method: str, workload: Path) -> dict[str, Any]:
    """Return the errors of a step of `method` by dtype, the losses, and `wrong`: "" or which error is too large.

    `workload` is the folder that `benchmarks.speed.workload` wrote for `checked_case`.
    """
    places = {"cpu": jax.devices("cpu")[0], "device": jax.devices()[0]}
    steps, arguments = {}, {}
    for dtype in ERROR:
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
        losses[key] = np.asarray(metrics["loss"], np.float64)
    errors = {
        dtype: max(_error(found[dtype, "device"], found[dtype, "cpu"]) for found in (changes, losses))
        for dtype in ERROR
    }
    return {**judge(errors), "losses": {" on the ".join(key): float(loss) for key, loss in losses.items()}}


def judge(errors: dict[str, float]) -> dict[str, Any]:
    """The verdict on the errors by dtype; `wrong` is "" if all are small enough."""
    wrong = [
        f"{dtype}: {error:.2e} from the CPU's step, and {ERROR[dtype]:.0e} is allowed"
        for dtype, error in errors.items()
        if not error <= ERROR[dtype]  # NaN is wrong
    ]
    return {"errors": {dtype: float(f"{error:.3g}") for dtype, error in errors.items()}, "wrong": "; ".join(wrong)}


def _made_ready(method: str, dtype: str, workload: Path) -> tuple[Any, Any, Any, Any]:
    """The step of `method`, its state, the frozen parameters and a batch."""
    parts = setup_run(run_config(checked_case(dtype), method, workload))
    state, descent = parts.initial_state(), optax.with_extra_args_support(optax.sgd(1.0))
    draw = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + 0.02 * draw.standard_normal(x.shape).astype(x.dtype), state.adapters)
    # Half of what a method may prune is pruned; indices of a sparse update, which stand in the same place, stay.
    masks = jax.tree.map(lambda x: draw.random(x.shape) < 0.5 if x.dtype == bool else x, state.masks)
    state = replace(state, adapters=adapters, masks=masks, opt_state=descent.init(adapters))
    step = make_train_step(parts.objective, descent, allocation=parts.plan.allocation)
    return step, state, parts.frozen, dict(np.load(workload / "check.npz"))


def _leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _error(found: Any, expected: Any) -> float:
    def norm(leaves: Any) -> float:
        return sum(float((leaf**2).sum()) for leaf in leaves) ** 0.5

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return norm([a - b for a, b in pairs]) / norm(jax.tree.leaves(expected))
