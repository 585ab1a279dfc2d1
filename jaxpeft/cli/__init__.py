"""The command line: `jaxpeft COMMAND` or `python -m jaxpeft COMMAND`. Each command has a file, which is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from jaxpeft.cli.process import own_process
from jaxpeft.errors import did_you_mean, fail

COMMANDS = {
    "train": "Fine-tune a model with adapters.",
    "evaluate": "Measure a run's best adapter on its data.",
    "predict": "Fill masks or classify texts with a run's best adapter.",
    "merge": "Write a plain model with a run's adapter merged in.",
    "pack": "Write a pruned adapter without its zeros.",
    "unpack": "Write a packed adapter in PEFT's form again.",
    "quantize": "Write a model with its linear layers in 4 or 8 bits.",
    "compare": "Compare methods at their best learning rates over several seeds.",
    "sparsity-plan": "Propose how much each layer may leave out in training (SparseLoRA).",
    "preflight": "Compile a run for a TPU without TPU hardware.",
}
"""Command → its line of help. `jaxpeft/cli/COMMAND.py` (with `_` for `-`) has its `main(argv, prog=…)`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command in `argv`, or in the process's own arguments. Entry point of `python -m jaxpeft` and of the `jaxpeft` script."""
    args = own_process() if argv is None else list(argv)
    first = args[0] if args else ""
    if first in ("-h", "--help"):
        print(_help())
    elif first == "--version":
        print(f"jaxpeft {version('jaxpeft')}")
    elif first in COMMANDS:
        import_module(f"jaxpeft.cli.{first.replace('-', '_')}").main(args[1:], prog=f"jaxpeft {first}")
    else:
        problem = f"unknown command '{first}'{did_you_mean(first, COMMANDS)}" if first else "a command is missing"
        fail(problem, prog="jaxpeft", hint=f"one of {', '.join(COMMANDS)}")


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: jaxpeft COMMAND [ARGUMENTS]",
            "",
            "Parameter-efficient fine-tuning of Flax transformers in pure JAX.",
            "",
            "commands:",
            *(f"  {name:{width}}{text}" for name, text in COMMANDS.items()),
            "",
            "options:",
            f"  {'-h, --help':{width}}Show this help; `jaxpeft COMMAND --help` shows a command's.",
            f"  {'--version':{width}}Show the version.",
        ]
    )
