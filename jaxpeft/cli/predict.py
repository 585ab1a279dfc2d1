"""`jaxpeft predict`: a finished run's answers to texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpeft.cli.process import guarded
from jaxpeft.cli.standard_input import with_standard_input
from jaxpeft.config.parsing import Parser
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from jaxpeft.data import Split
    from jaxpeft.runs.load import TrainedRun


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse the arguments and print or write the answers."""
    parser = Parser(prog=prog, description="Answer texts as the run was trained to: fill their masks, classify them, …")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument(
        "texts", nargs="*", help="Texts, each in quotes; -: the lines of standard input, one text a line."
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        help="The second text of each, if the run was trained on pairs; the context of a question; of two embedded texts: their cosine.",
    )
    parser.add_argument(
        "--file",
        type=str,
        help="A .txt, .csv, .tsv, .json, .jsonl or .parquet file of texts, instead of them, or one of the task's own formats.",
    )
    parser.add_argument("--text_column", type=str, help="Its column with the text; null: as in training.")
    parser.add_argument(
        "--text_pair_column",
        type=str,
        help="Its column with the second text; null: as in training, or none if texts are embedded.",
    )
    parser.add_argument("--output", type=str, help="A .jsonl or .csv file to write; null: JSON lines on the terminal.")
    parser.add_argument(
        "--top", type=int, help="Answers per text or mask, if there are several; null: 5, and for a file all labels."
    )
    values = parser.parse_args(list(argv))
    guarded(lambda: predict(**values.as_dict()), prog)


def predict(
    run: str,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    file: str | None,
    text_column: str | None,
    text_pair_column: str | None,
    output: str | None,
    top: int | None,
) -> None:
    """Print the answers of the run in the directory `run` to `texts`, or write those to the texts of `file`."""
    if top is not None and top < 1:
        raise InputError(f"--top is {top}; it must be at least 1")
    if bool(texts) == (file is not None):
        raise InputError("give texts, each in quotes, or --file with a file of them")
    if file is None and (output or text_column or text_pair_column):
        flag = "--output" if output else "--text_column" if text_column else "--text_pair_column"
        raise InputError(f"{flag} is for texts of a file; give --file")
    if file is not None and pairs:
        raise InputError("--pairs is for texts of the command line; give --text_pair_column")
    texts = with_standard_input(run, texts)
    if pairs and len(pairs) != len(texts):
        raise InputError(f"{len(texts)} texts and {len(pairs)} --pairs; give a second text for each")
    from jaxpeft.cli.answers_file import check_output, write_answers
    from jaxpeft.data import Split
    from jaxpeft.report.console import log
    from jaxpeft.runs.compilation_cache import enable_compilation_cache
    from jaxpeft.runs.load import load_run

    if output:
        check_output(Path(output))
    enable_compilation_cache()
    trained = load_run(run)
    task = trained.objective.task
    if top is not None and not task.ranks_answers:
        raise InputError(f"--top {top} chooses among several answers, and {task.name} gives one; leave it out")
    if file is not None:
        split = trained.read_texts(file, text_column=text_column, text_pair_column=text_pair_column)
        write_answers(trained, split, Path(output) if output else None, where=file, top=top)
        return
    split = Split(list(texts), list(pairs) if pairs else None)
    for text, answer in zip(split.texts, _answers(trained, split, top or 5), strict=True):
        log(text)
        for line in task.in_words(answer):
            log(f"  {line}")


def _answers(trained: TrainedRun, split: Split, top: int) -> Iterator[Any]:
    from jaxpeft.report.console import log

    for reply in trained.replies(split, top=top):
        if reply.num_truncated:
            log(
                f"{reply.num_truncated} of the texts are longer than {trained.config.data.max_length} tokens and were cut"
            )
        yield from reply.answers
