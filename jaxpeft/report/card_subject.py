"""The finished run that a model card describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxpeft.adapters import Method
from jaxpeft.config import RunConfig
from jaxpeft.models.build import Model
from jaxpeft.report.methods import citations, method_name
from jaxpeft.report.results import Results
from jaxpeft.tasks.base import Task


@dataclass(frozen=True)
class CardSubject:
    """The finished run that a card describes.

    Attributes:
        export: the directory of the exported files, where the card is written.
        config: the run's configuration.
        task: the run's task.
        model: the base.
        method: the adapter method as configured; None for the baselines.
        results: the run's measurements.
        warmup_steps: steps over which the learning rate rose.
        drawn_base: the directory of the base if the run initialised it at random, because no other place has it; else None.
        masks: the picture of the masks, beside the exported files; None if the run has no log of them.
        confusion: the picture of the classes by the predicted ones, in the same place; None if the run has none.
    """

    export: Path
    config: RunConfig
    task: Task
    model: Model
    method: Method | None
    results: Results
    warmup_steps: int = 0
    drawn_base: Path | None = None
    masks: Path | None = None
    confusion: Path | None = None

    @property
    def title(self) -> str:
        """The run's method in words."""
        return method_name(self.config.adapter, self.config.pruning, self.config.model, self.config.contextual)

    def without_paths(self, text: str) -> str:
        """`text` with the names of the data files in the place of their paths, which say nothing to another reader."""
        data = self.config.data
        for path in filter(None, (data.train_file, data.validation_file, data.test_file)):
            text = text.replace(path, Path(path).name)
        return text

    @property
    def citations(self) -> list[str]:
        """One line for every published method that the run uses; for a baseline, the encoder's paper, if it is known."""
        methods = citations(self.config.adapter, self.config.pruning, self.config.model, self.config.contextual)
        encoder = self.model.family.citation
        return methods or ([encoder] if encoder else [])
