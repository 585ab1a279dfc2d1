"""The evaluations of a run: validation during training, and the test at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from jaxpeft.config import EvaluationConfig
from jaxpeft.data import Splits
from jaxpeft.tasks.base import Task
from jaxpeft.tasks.by_class import ByClass
from jaxpeft.tasks.text_pipeline import TextPipeline
from jaxpeft.training.evaluation import EvalStep, Evaluated, evaluate, pseudo_perplexity
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import make_eval_step
from jaxpeft.trees import Adapters, Layers, Params


@dataclass(frozen=True)
class Evaluator:
    """Measures adapters on the run's validation and test rows.

    Attributes:
        options: the run's evaluation flags.
        task: turns the outputs into metrics.
        validation_data: the tokenised validation rows.
        test_data: the tokenised test rows; without a test split, the validation rows.
        step: the jitted evaluation step.
        parallel: the devices.
        label_names: the classes' names in the order of their ids, if they have any.
        traces: the evaluation programs compiled so far, counted by batch shape.
    """

    options: EvaluationConfig
    task: Task
    validation_data: Any
    test_data: Any
    step: EvalStep
    parallel: DataParallel
    label_names: tuple[str, ...] | None = None
    traces: Counter = field(default_factory=Counter)

    @classmethod
    def build(
        cls,
        options: EvaluationConfig,
        splits: Splits,
        pipeline: TextPipeline,
        objective: Objective,
        parallel: DataParallel,
        *,
        seed: int,
    ) -> Evaluator:
        """Tokenise the validation and test rows. Nothing is compiled yet."""

        def data(split: Any) -> Any:
            return objective.task.make_data(split, pipeline, batch_size=options.batch_size, seed=seed)

        validation = data(splits.validation)
        test = data(splits.test) if splits.test else validation
        traces: Counter = Counter()
        step = make_eval_step(objective, traces)
        return cls(options, objective.task, validation, test, step, parallel, splits.label_names, traces)

    def with_objective(self, objective: Objective) -> Evaluator:
        """An evaluator of another `objective` on the same data."""
        traces: Counter = Counter()
        return replace(self, task=objective.task, step=make_eval_step(objective, traces), traces=traces)

    def validate(self, frozen: Params, adapters: Adapters, masks: Layers) -> dict[str, float]:
        """Metrics on the validation rows, or on at most `evaluation.max_batches` batches of them."""
        data = self._validation_rows()
        return self.task.measure(*self._evaluated(frozen, adapters, masks, data), data)

    def calibrated(self, frozen: Params, adapters: Adapters, masks: Layers) -> Evaluator:
        """The evaluator with the task's thresholds, if it has any, chosen on the validation rows. The program stays the same."""
        if not self.task.calibration:
            return self
        data = self._validation_rows()
        found = self._evaluated(frozen, adapters, masks, data)
        assert found.outputs is not None
        assert found.labels is not None
        return replace(self, task=self.task.calibrated(found.outputs, found.labels, data))

    def test(self, frozen: Params, adapters: Adapters, masks: Layers) -> tuple[dict[str, float], ByClass | None]:
        """Metrics on the test rows, or on at most `evaluation.max_test_batches` batches of them; and the figures of each class,
        if the task has classes.

        `pseudo_perplexity` is among them if `evaluation.pseudo_perplexity` is set and the task has such a figure.
        """
        e, task = self.options, self.task
        data = task.evaluated(self.test_data, e.max_test_batches)
        found = self._evaluated(frozen, adapters, masks, data)
        metrics = task.measure(*found, data)
        if e.pseudo_perplexity:
            batches = task.single_mask_batches(self.test_data, e.pseudo_perplexity_rows)
            if batches is not None:
                metrics["pseudo_perplexity"] = pseudo_perplexity(
                    self.step, self.parallel, frozen, adapters, masks, batches
                )
        if found.outputs is None or found.labels is None:
            return metrics, None
        return metrics, task.by_class(found.outputs, found.labels, self.label_names, data)

    def _validation_rows(self) -> Any:
        return self.task.evaluated(self.validation_data, self.options.max_batches)

    def _evaluated(self, frozen: Params, adapters: Adapters, masks: Layers, data: Any) -> Evaluated:
        return evaluate(self.step, self.parallel, frozen, adapters, masks, data.eval_batches(), self.task.gathered)
