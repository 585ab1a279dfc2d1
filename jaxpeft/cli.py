"""The commands: train, compare, preflight and the ones on finished runs. Parses flags and files; what they do is imported only then."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.config import EvaluationConfig, ModelConfig
from jaxpeft.config_file import Parser, fail, parse_file_into, parse_run, parse_run_and
from jaxpeft.errors import InputError, near


def train(argv: Sequence[str] | None = None, *, prog: str, default_config: Path | None = None) -> None:
    """Parse a run's flags and train; `default_config` is read where no `--config` is given."""
    args = _own_process() if argv is None else list(argv)
    values = parse_run(args, prog, default_config)

    def run() -> None:
        config = values()
        from jaxpeft import experiment

        experiment.run(config)

    _guarded(run, prog)


def preflight(argv: Sequence[str], *, prog: str) -> None:
    """Parse a run's flags and preflight's own, and compile the run's steps for a TPU; exits with status 1 where they do not fit."""
    values, build = parse_run_and(list(argv), prog, description=_PREFLIGHT, add_flags=_add_preflight_flags)

    def run() -> None:
        config = build()
        from jaxpeft.preflight import command

        fits = command.run(
            config, values.topology, largest_batch=values.largest_batch, every_bucket=values.every_bucket
        )
        sys.exit(0 if fits else 1)

    _guarded(run, prog)


def compare(argv: Sequence[str], *, prog: str) -> None:
    """Parse a comparison's file and flags, run what is left of it, and write its report."""
    from jaxpeft.comparison.grid import CompareConfig

    values = parse_file_into(CompareConfig, list(argv), prog, description=_COMPARE)

    def run() -> None:
        config = values()
        from jaxpeft.comparison import command

        command.run(config)

    _guarded(run, prog)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m jaxpeft` and of the `jaxpeft` script."""
    args = _own_process() if argv is None else list(argv)
    if args[:1] == ["train"]:
        return train(args[1:], prog="jaxpeft train")
    if args[:1] == ["compare"]:
        return compare(args[1:], prog="jaxpeft compare")
    if args[:1] == ["preflight"]:
        return preflight(args[1:], prog="jaxpeft preflight")
    prog = "jaxpeft"
    parser = Parser(
        prog=prog,
        description="Work with finished runs; `jaxpeft train --help` trains one, `jaxpeft compare --help` many, and "
        "`jaxpeft preflight --help` compiles one for a TPU that is not here.",
        exit_on_error=True,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    commands.add_subcommand("evaluate", _evaluate_parser(), help="Measure a run's best adapter on its data.")
    commands.add_subcommand(
        "predict", _predict_parser(), help="Fill masks or classify texts with a run's best adapter."
    )
    commands.add_subcommand("merge", _merge_parser(), help="Write a plain model with the adapter merged in.")
    commands.add_subcommand("quantize", _quantize_parser(), help="Write a model with its linear layers in 4 or 8 bits.")
    if args[:1] and not args[0].startswith("-") and args[0] not in COMMANDS:
        fail(f"unknown command '{args[0]}'{near(args[0], COMMANDS)}", prog=prog, hint=f"one of {', '.join(COMMANDS)}")
    values = parser.parse_args(args).as_dict()
    options = {key: value for key, value in values[values["command"]].items() if key != "config"}
    _guarded(lambda: _dispatch(values["command"], options), f"{prog} {values['command']}")
    return None


COMMANDS = ("train", "compare", "preflight", "evaluate", "predict", "merge", "quantize")


_COMPARE = (
    "Compare methods: every one at its own best learning rate, over several seeds, beside full fine-tuning and the head alone; one report "
    "as Markdown, HTML and CSV. The same command goes on where it was interrupted."
)

_PREFLIGHT = (
    "Compile a run's training and evaluation steps for a TPU that is not here (Linux on x86-64, with libtpu): whether they fit, "
    "what they cost, what limits them, and the largest batch. Exit status: 0 where everything fits, 1 where it does not, 2 for bad input."
)


def _add_preflight_flags(parser: Parser) -> None:
    parser.add_argument(
        "--topology", required=True, help="Chip and shape of the slice: v5e:2x4, v5p:2x2x1, v6e:16x16, …"
    )
    parser.add_argument(
        "--largest_batch",
        type=bool,
        default=True,
        help="Also search for the largest training batch: some more compilations.",
    )
    parser.add_argument(
        "--every_bucket",
        type=bool,
        default=False,
        help="Compile every bucket length of a classification, not the longest only.",
    )


def _evaluate_parser() -> Parser:
    parser = Parser(description="Measure a run's best adapter on its data.")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="Which split to measure.")
    parser.add_argument(
        "--pseudo_perplexity", type=bool, default=False, help="Also mask every token one at a time (masked-lm)."
    )
    rows = EvaluationConfig.pseudo_perplexity_rows
    parser.add_argument("--pseudo_perplexity_rows", type=int, default=rows, help="Rows that pseudo-perplexity reads.")
    return parser


def _predict_parser() -> Parser:
    parser = Parser(description="Fill every [MASK] of the texts (masked-lm), or classify them.")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument("texts", nargs="+", help="Texts, each in quotes.")
    parser.add_argument("--top", type=int, default=5, help="Answers per text or mask.")
    return parser


def _merge_parser() -> Parser:
    parser = Parser(description="Merge a run's adapter into its base, as a model that transformers loads.")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument("output", help="A new directory for the model.")
    parser.add_argument(
        "--requantize",
        type=bool,
        default=False,
        help="Quantise the sum again, as the run's base is; false: write it in float32.",
    )
    return parser


def _quantize_parser() -> Parser:
    parser = Parser(
        description="Write a model with its encoder's linear layers quantised, as bitsandbytes stores them."
    )
    parser.add_argument("model", help="What --model.name takes: hub id, directory, package:module/folder.")
    parser.add_argument("output", help="A new directory for the model.")
    parser.add_argument("--data_type", choices=["nf4", "fp4", "int8"], default="nf4", help="How weights are stored.")
    parser.add_argument(
        "--block_size",
        type=int,
        default=ModelConfig.quantization_block_size,
        help="Weights that share one scale in 4 bits, a power of two from 64 to 4096.",
    )
    parser.add_argument(
        "--double_quantization", type=bool, default=True, help="Store the scales of 4-bit weights in 8 bits too."
    )
    parser.add_argument(
        "--task",
        choices=["masked-lm", "classification"],
        default=None,
        help="Write only what the model for this task has; null: all that the checkpoint holds for either. In torch, a "
        "bare BERT's masked language model loads only from what was written for masked-lm.",
    )
    return parser


def _dispatch(command: str, options: dict[str, Any]) -> None:
    from jaxpeft.compilation import keep_programs

    keep_programs()
    if command == "quantize":
        from jaxpeft import quantizing

        return quantizing.run(**options)
    from jaxpeft import finished

    commands: dict[str, Callable[..., None]] = {
        "evaluate": finished.evaluate,
        "predict": finished.predict,
        "merge": finished.merge,
    }
    return commands[command](**options)


def _own_process() -> list[str]:
    """The arguments of this process, which runs a command and nothing else.

    So transformers and datasets need not import the other frameworks that happen to be installed: torch takes two seconds and 200 MB.
    """
    for framework in ("USE_TORCH", "USE_TF"):
        os.environ.setdefault(framework, "0")
    return sys.argv[1:]


def _guarded(action: Callable[[], None], prog: str) -> None:
    """Run `action`; what the user caused becomes one line and status 2, and a bug keeps its traceback."""
    try:
        action()
    except InputError as error:
        fail(str(error), prog=prog)
