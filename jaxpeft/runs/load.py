"""Load a finished run: its base with its best adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxpeft.config import RunConfig
from jaxpeft.data import Split
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.files import load_adapter
from jaxpeft.report.results import Results, read_results
from jaxpeft.runs.adapters import build_method
from jaxpeft.runs.base_model import load_base
from jaxpeft.runs.data import read_texts, text_pipeline
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.tasks import task_for
from jaxpeft.tasks.base import Answers, RowError
from jaxpeft.tasks.text_pipeline import TextPipeline
from jaxpeft.training.objective import Objective
from jaxpeft.training.prediction import answer
from jaxpeft.trees import Adapters, Params

_TEXTS_PER_CHUNK = 1024
"""Texts that are tokenised and answered at a time, so that the memory does not depend on their number."""


@dataclass(frozen=True)
class Reply:
    """The answers to some consecutive texts.

    Attributes:
        answers: one for each text (`TrainedRun.predict`).
        num_truncated: number of the texts that were cut to the run's `data.max_length`.
    """

    answers: list[Any]
    num_truncated: int


@dataclass(frozen=True)
class TrainedRun:
    """A finished run in memory: its base with its best adapter.

    Attributes:
        directory: the run's directory.
        config: its configuration. `model` names the run's own base if it wrote one.
        results: its measurements.
        objective: computes logits from `frozen` and `adapters`.
        frozen: the base's parameters.
        adapters: the best adapter.
        pipeline: turns texts into the rows that the run was trained on.
    """

    directory: Path
    config: RunConfig
    results: Results
    objective: Objective
    frozen: Params
    adapters: Adapters
    pipeline: TextPipeline

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self.pipeline.tokenizer

    def predict(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, top: int | None = 5
    ) -> list[list[Answers]] | list[Answers]:
        """The `top` most likely answers (None: all) to each of `texts`, most likely first.

        A text is cut to `data.max_length` tokens, as in training. Only texts with masks are not cut.

        Args:
            texts: the texts.
            pairs: the second text of each, if the run was trained on pairs.
            top: the number of answers.

        Returns:
            for masked-lm, per text and mask a list of (token, probability); for classification, per text a list of
            (label, probability); for the other tasks see `make_questions` in their file (`jaxpeft.tasks`).

        Raises:
            InputError: pairs are given and the run was trained without, or the other way round; or for masked-lm, a text is too long
                or has no mask.
        """
        return [answer for reply in self.replies(Split(texts, pairs), top=top) for answer in reply.answers]

    def replies(self, split: Split, *, top: int | None = 5) -> Iterator[Reply]:
        """The answers to the texts of `split`, some at a time. Arguments and errors are those of `predict`."""
        for start in range(0, len(split), _TEXTS_PER_CHUNK):
            rows = slice(start, start + _TEXTS_PER_CHUNK)
            # As lists, so that each text is read from disk once.
            chunk = Split(list(split.texts[rows]), None if split.pairs is None else list(split.pairs[rows]))
            # A power of two, so that a few texts are not padded to a whole batch and few programs are compiled.
            batch_size = min(self.config.evaluation.batch_size, 1 << (len(chunk) - 1).bit_length())
            try:
                questions = self.objective.task.make_questions(chunk, self.pipeline, batch_size=batch_size, top=top)
            except RowError as error:
                raise RowError(start + error.row, str(error)) from None
            answers = answer(questions, lambda batch: self._logits(self.frozen, self.adapters, {}, batch))
            yield Reply(answers, questions.num_truncated)

    def read_texts(self, path: str, *, text_column: str | None = None, text_pair_column: str | None = None) -> Split:
        """The texts of a file, without labels; those of a large file stay on disk. Columns that are not named are as in training.

        Raises:
            InputError: the file or a column does not exist or cannot be read, or a row has no text.
        """
        kind = type(self.objective.task)
        return read_texts(self.config.data, kind, path, text_column=text_column, text_pair_column=text_pair_column)

    @cached_property
    def _logits(self) -> Any:
        return jax.jit(self.objective.logits)


def load_run(directory: Path | str) -> TrainedRun:
    """Load the run in `directory` with its best adapter.

    Raises:
        InputError: there is no run in `directory`, or it has not finished.
    """
    files = RunDirectory(Path(directory))
    if not files.path.is_dir():
        raise InputError(f"no such run: '{files}'")
    config = files.read_config()
    if not files.is_finished:
        raise InputError(f"the run in '{files}' has not finished; continue it with {files.resume_flags}")
    results = read_results(files.results)
    is_full = config.adapter.method == "full"
    own_base = files.model if is_full else files.base if config.model.weights == "random" else None
    if own_base:
        # A base that was fully trained or initialised at random is read from the run's own files. A random base cannot be drawn
        # again, because the last digits would differ on another machine.
        config = replace(config, model=replace(config.model, name=str(own_base), weights="pretrained"))
    task = task_for(config.task, results.num_labels, results.label_names).configured(config.task_options)
    task = task.with_calibration(results.calibration)
    method = build_method(config.adapter)
    length = config.data.max_length
    model, tokenizer = load_base(config.model, task, method, config.adapter, max_length=length, seed=config.seed)
    frozen: Params = model.params
    adapters: Adapters = {"sites": {}, "modules": {}}
    loaded = None
    if not is_full:
        frozen, adapters, loaded = load_adapter(files.adapter, model.params)
    objective = Objective(model, loaded, task, on_cpu=jax.default_backend() == "cpu")
    pipeline = text_pipeline(
        replace(config.data, token_cache=None),  # the machine that answers need not have the place, and keeps no tokens
        model,
        tokenizer,
        method=loaded,
        reads_pairs=results.reads_pairs,
        label_names=results.label_names,
    )
    return TrainedRun(files.path, config, results, objective, frozen, adapters, pipeline)
