"""One side in a process of its own: reads a command a line on stdin, answers a JSON line on stdout, and sleeps in between.

    {"do": "about"}                              {"do": "start", "case": …, "method": …, "workload": …, "variant": …}
    {"do": "round"}                              {"do": "memory", "reset": true}
    {"do": "count"}                              {"do": "rate", "size": [m, k, n], "dtype": …, "repeats": …}

Each side has a process of its own, for two reasons: peak memory is then that of one side, and the sides can have different versions of
transformers. Waiting costs no processor time: the threads of OpenMP and XLA stop spinning a few milliseconds after their last work.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import Case, OurMethod

MODULES = {"ours": "jaxpeft_side", "theirs": "peft_side"}
"""Side, as the stored records name it → its module."""


def main(side: str) -> None:
    """Serve one side, "ours" or "theirs", until stdin ends."""
    # stdout carries the answers, so whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trainer: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            module = importlib.import_module(f"benchmarks.speed.{MODULES[side]}")
            if command["do"] == "start":
                trainer = _start(module, command)
            answer = _answer(module, trainer, command)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _start(module: Any, command: dict[str, Any]) -> Any:
    case = Case(**command["case"])
    extra = {"variant": command["variant"]} if command["variant"] else {}
    method = command["method"]
    method = OurMethod(**method) if isinstance(method, dict) else method
    return module.Trainer(case, method, Path(command["workload"]), **extra)


def _answer(module: Any, trainer: Any, command: dict[str, Any]) -> dict[str, Any]:
    match command["do"]:
        case "about":
            return module.about()
        case "start":
            return {"trainable": trainer.trainable, "first_loss": trainer.first_loss, "attention": trainer.attention}
        case "round":
            seconds, loss = trainer.run_round()
            return {"seconds": seconds, "loss": loss, **trainer.work()}
        case "memory":
            return _memory(module, reset=command.get("reset", False))
        case "count":
            return {"flops": trainer.counted_flops()}
        case "rate":
            rate = module.matrix_rate(*command["size"], dtype=command["dtype"], repeats=command["repeats"])
            return {"flops_per_second": rate}
    raise ValueError(f"unknown command {command}")


def _memory(module: Any, *, reset: bool) -> dict[str, Any]:
    """Peak bytes: of the process since the last reset, of its whole life, and of the device (None on a CPU)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    answer = {
        "training": int(status["VmHWM"].split()[0]) * 1024,
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": module.device_memory(),
    }
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from the memory that is resident now
    return answer


if __name__ == "__main__":
    main(sys.argv[1])
