"""The evaluations of one run: validation during training, test at the end, by the task's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from jaxpeft.config import RunConfig
from jaxpeft.data import ClassificationData, MaskedLMData, Splits
from jaxpeft.runs.prepare import Data, metric_names, prepare_data
from jaxpeft.training.evaluation import EvalStep, evaluate_classification, evaluate_masked_lm, first, pseudo_perplexity
from jaxpeft.training.objective import Batch, Objective
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import make_eval_step
from jaxpeft.trees import Adapters, Layers, Params


@dataclass(frozen=True)
class Evaluator:
    """Measures adapters on the run's validation and test rows; where there is no test split, `test` is the validation's."""

    config: RunConfig
    validation_data: Data
    test_data: Data
    step: EvalStep
    parallel: DataParallel
    names: tuple[str, ...]
    traces: Counter = field(default_factory=Counter)

    @classmethod
    def build(
        cls, config: RunConfig, splits: Splits, tokenizer: Any, objective: Objective, parallel: DataParallel
    ) -> Evaluator:
        """Tokenise the rows to judge by, and compile nothing yet."""

        def data(split: Any) -> Data:
            return prepare_data(config, split, tokenizer, config.evaluation.batch_size)

        validation = data(splits.validation)
        test = data(splits.test) if splits.test else validation
        traces: Counter = Counter()
        step = make_eval_step(objective, traces)
        return cls(config, validation, test, step, parallel, metric_names(config, splits.num_labels), traces)

    def of(self, objective: Objective) -> Evaluator:
        """The same data, to judge another objective by."""
        traces: Counter = Counter()
        return replace(self, step=make_eval_step(objective, traces), traces=traces)

    def validate(self, frozen: Params, adapters: Adapters, masks: Layers) -> dict[str, float]:
        """Metrics on the validation rows, or `evaluation.max_batches` of them."""
        return self._measure(frozen, adapters, masks, self.validation_data, self.config.evaluation.max_batches)

    def test(self, frozen: Params, adapters: Adapters, masks: Layers) -> dict[str, float]:
        """Metrics on the test rows, or `evaluation.max_test_batches` of them, with `pseudo_perplexity` where that is asked for."""
        e = self.config.evaluation
        metrics = self._measure(frozen, adapters, masks, self.test_data, e.max_test_batches)
        if isinstance(self.test_data, MaskedLMData) and e.pseudo_perplexity:
            batches = self.test_data.head(e.pseudo_perplexity_rows).single_mask_batches()
            metrics["pseudo_perplexity"] = pseudo_perplexity(self.step, self.parallel, frozen, adapters, masks, batches)
        return metrics

    def _measure(
        self, frozen: Params, adapters: Adapters, masks: Layers, data: Data, limit: int | None
    ) -> dict[str, float]:
        if limit and isinstance(data, ClassificationData):
            data = data.sample(
                limit * data.batch_size
            )  # its batches are by length: the first ones are of the shortest rows
        batches: Iterable[Batch] = first(data.eval_batches(), limit)
        args = (self.step, self.parallel, frozen, adapters, masks, batches)
        if isinstance(data, ClassificationData):
            return evaluate_classification(*args, self.names)
        return evaluate_masked_lm(*args)
