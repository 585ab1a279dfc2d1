"""`jaxpeft predict`: a finished run's answers to texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpeft.cli.process import guarded
from jaxpeft.config.parsing import Parser
from jaxpeft.errors import InputError


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse the arguments and print the answers."""
    parser = Parser(prog=prog, description="Fill every [MASK] of the texts (masked-lm), or classify them.")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument("texts", nargs="+", help="Texts, each in quotes.")
    parser.add_argument("--top", type=int, default=5, help="Answers per text or mask.")
    values = parser.parse_args(list(argv))
    guarded(lambda: predict(**values.as_dict()), prog)


def predict(run: str, texts: Sequence[str], top: int) -> None:
    """Print the answers of the run in the directory `run` to `texts`."""
    if top < 1:
        raise InputError(f"--top is {top}; it must be at least 1")
    from jaxpeft.report.console import log
    from jaxpeft.runs.compilation_cache import enable_compilation_cache
    from jaxpeft.runs.load import load_run

    enable_compilation_cache()
    answers: list[Any] = load_run(run).predict(texts, top=top)
    for text, found in zip(texts, answers, strict=True):
        log(text)
        groups = found if found and isinstance(found[0], list) else [found]  # a list of answers per mask, or only one
        for i, group in enumerate(groups):
            place = f"mask {i + 1}: " if len(groups) > 1 else ""
            log("  " + place + ", ".join(_in_words(name, value) for name, value in group))


def _in_words(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "value" else f"{name} {100 * value:.1f} %"
