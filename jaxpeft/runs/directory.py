"""A run's directory: every file name in it, what may start there, and what may be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.config import RunConfig
from jaxpeft.config.files import differences, read_config, write_config
from jaxpeft.errors import InputError


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run, all below `path`."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> RunDirectory:
        """The directory of the run that `config` describes: `output_dir/name`."""
        return cls(Path(config.output_dir) / config.run_name)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> Path:
        """The resolved configuration, which `--config` reads."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        """What the run measured; a run that has it has finished."""
        return self.path / "results.json"

    @property
    def metrics(self) -> Path:
        """Metrics as they happened, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same as TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def curves(self) -> Path:
        """Losses, drawn."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """Orbax's checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The exported adapter, in PEFT's files."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The exported model, if everything trained."""
        return self.path / "model"

    @property
    def base(self) -> Path:
        """The base, if it was drawn at random: nobody else has it."""
        return self.path / "base"

    @property
    def failure(self) -> Path:
        """Why the run failed, in a comparison."""
        return self.path / "failure.txt"

    @property
    def forgetting(self) -> Path:
        """What a comparison measured of its forgetting."""
        return self.path / "forgetting.json"

    @property
    def forgetting_failure(self) -> Path:
        """Why that could not be measured."""
        return self.path / "forgetting-failure.txt"

    @property
    def is_started(self) -> bool:
        """Whether there is a run, finished or not."""
        return self.config.is_file()

    @property
    def newest_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        steps = self.checkpoints.glob("[0-9]*")
        return max((int(path.name) for path in steps if path.name.isdigit()), default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the run has finished."""
        return self.results.is_file()

    @property
    def resume_flags(self) -> str:
        """The flags that continue the run."""
        return f"--config {self.config} --resume"

    def read_config(self) -> RunConfig:
        """The run's configuration.

        Raises:
            InputError: if there is none.
        """
        return read_config(self.config)

    def check(self, values: Mapping[str, Any], *, resume: bool) -> None:
        """Check that the directory is new, or on resume that it holds a run with the same configuration.

        Args:
            values: the configuration's `resolved()` values.
            resume: whether a run is continued.

        Raises:
            InputError: if not, with the way out.
        """
        if not resume:
            if self.path.exists() and any(self.path.iterdir()):
                raise InputError(
                    f"'{self}' already holds a run; continue it with {self.resume_flags}, or give another --name"
                )
            return
        if not self.is_started:
            raise InputError(
                f"nothing to resume in '{self}'; start the run without --resume, or give the --name it had"
            )
        if changed := self.differences(values):
            raise InputError(
                f"'{self}' was started with another configuration ({'; '.join(changed)}); resume with {self.resume_flags}"
            )

    def differences(self, values: Mapping[str, Any]) -> list[str]:
        """The keys in which the run's configuration differs from `values`, in words."""
        return differences(self.read_config().resolved(), values)

    def create(self, values: Mapping[str, Any]) -> None:
        """Make the directory, with the configuration's `resolved()` values."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_config(values, self.config)
