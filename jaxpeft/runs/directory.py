"""A run's directory: the names of all its files, and the rules for starting or resuming a run in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.config import RunConfig
from jaxpeft.config.files import differences, read_config, write_config
from jaxpeft.errors import InputError
from jaxpeft.runs.lock import locked


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
        """The resolved configuration, which `--config` reads back."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        """The results. They are written last, so a run has finished if this file exists."""
        return self.path / "results.json"

    @property
    def metrics(self) -> Path:
        """The metrics of training and validation, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same metrics as TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def curves(self) -> Path:
        """A picture of the losses."""
        return self.path / "curves.png"

    @property
    def sparsity(self) -> Path:
        """The masks of a pruned run, one JSON object (`pruning.record.mask_record`) for each step at which they changed."""
        return self.path / "sparsity.jsonl"

    @property
    def sparsity_picture(self) -> Path:
        """A picture of these masks. The export has a copy, beside the model card that shows it."""
        return self.path / "sparsity.png"

    @property
    def confusion(self) -> Path:
        """A picture of which classes a classification takes for which. The export has a copy."""
        return self.path / "confusion.png"

    @property
    def checkpoints(self) -> Path:
        """Orbax's checkpoints, one directory per step."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The exported adapter, in PEFT's files."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The exported model, for full fine-tuning."""
        return self.path / "model"

    @property
    def base(self) -> Path:
        """The base, if it was initialised at random, because no other place has it."""
        return self.path / "base"

    @property
    def estimators(self) -> Path:
        """The estimators that choose channels, if the run leaves some out."""
        return self.path / "estimators.safetensors"

    @property
    def failure(self) -> Path:
        """The reason of the run's failure, if it is part of a comparison."""
        return self.path / "failure.txt"

    @property
    def forgetting(self) -> Path:
        """The forgetting that a comparison measured."""
        return self.path / "forgetting.json"

    @property
    def forgetting_failure(self) -> Path:
        """The reason for which forgetting could not be measured."""
        return self.path / "forgetting-failure.txt"

    @property
    def is_started(self) -> bool:
        """True if the directory holds a run, finished or not."""
        return self.config.is_file()

    @property
    def newest_step(self) -> int:
        """The step of the newest checkpoint, or 0 if there is none. The checkpoint is not opened."""
        steps = self.checkpoints.glob("[0-9]*")
        return max((int(path.name) for path in steps if path.name.isdigit()), default=0)

    @property
    def is_finished(self) -> bool:
        """True if there is `results.json`, which is written last."""
        return self.results.is_file()

    @property
    def has_nothing_to_keep(self) -> bool:
        """True if a run started here and ended before its first checkpoint. The same command may start it again."""
        return self.is_started and not self.is_finished and self.newest_step == 0

    @property
    def resume_flags(self) -> str:
        """The flags that resume the run."""
        return f"--config {self.config} --resume"

    def read_config(self) -> RunConfig:
        """Read the run's configuration.

        Raises:
            InputError: there is none, or it is invalid.
        """
        return read_config(self.config)

    def check(self, values: Mapping[str, Any], *, resume: bool) -> None:
        """Check that the directory is new, or on resume that it holds a run with the same configuration.

        Args:
            values: the configuration's `resolved()` values.
            resume: True to resume a run, False to start one.

        Raises:
            InputError: the check fails, or another process is training the run. The message says what to do instead.
        """
        if not resume:
            if self.has_nothing_to_keep:
                with self.in_use():
                    return
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

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other processes from starting a run here while the block runs, by a lock on the configuration's file.

        Raises:
            InputError: another process has the lock.
        """
        refusal = f"another process is training the run in '{self}'; wait for its end, or give another --name"
        with locked(self.config, refusal):
            yield

    def differences(self, values: Mapping[str, Any]) -> list[str]:
        """The keys that differ between the run's configuration and `values`, each as `key: old, now new`."""
        return differences(self.read_config().resolved(), values)

    def create(self, values: Mapping[str, Any]) -> None:
        """Create the directory, and write the configuration's `resolved()` values to it.

        The files of a run that ended here before its first checkpoint are removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.has_nothing_to_keep:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            shutil.rmtree(self.tensorboard, ignore_errors=True)
            for file in (self.metrics, self.sparsity, self.estimators, self.failure):
                file.unlink(missing_ok=True)
        write_config(values, self.config)
