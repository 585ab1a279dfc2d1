"""Checkpoints: the only module that uses Orbax. It saves the state, the run's progress and the hash of the base.

The base itself is never saved. The newest checkpoint, to resume from, and the best one are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxpeft.errors import InputError
from jaxpeft.training.dropout import GENERATORS
from jaxpeft.training.step import TrainState


@dataclass(frozen=True)
class Progress:
    """A run's progress besides its state.

    Attributes:
        step: steps done.
        best_step: step of the best validation so far, or None.
        best_score: its score, larger is better.
        since_best: validations since then.
        seconds: training time so far.
        micro_batch_tokens: tokens of a micro-batch of the longest rows; None: a batch is one pass.
    """

    step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    since_best: int = 0
    seconds: float = 0.0
    micro_batch_tokens: int | None = None


# Names in the files. They are older than the names in the code, and old checkpoints must stay readable.
_ON_DISK = {"step": "update", "best_step": "best_update", "micro_step": "step", "memory": "importance"}


def _to_disk(state: TrainState) -> dict[str, Any]:
    return {_ON_DISK.get(key, key): value for key, value in vars(state).items()}


def _from_disk(tree: dict[str, Any]) -> TrainState:
    return TrainState(**{key: tree[_ON_DISK.get(key, key)] for key in TrainState.__dataclass_fields__})


def hash_base(tree: Any) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a tree's arrays, to identify a frozen base."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # bf16 has no buffer format
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run, in `directory`."""

    def __init__(self, directory: Path, base_hash: str) -> None:
        best = policies.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), best]),
            single_host_load_and_broadcast=True,  # only one process looks for checkpoints
        )
        # A manager that has not saved yet does not know the items of a checkpoint, and so could not read their metadata.
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)
        self._base_hash = base_hash

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress) -> None:
        """Save the checkpoint of step `progress.step`. The best one is kept until `progress` names a better one."""
        meta = {
            "base_hash": self._base_hash,
            **{_ON_DISK.get(key, key): value for key, value in vars(progress).items()},
        }
        args = ocp.args.Composite(state=ocp.args.StandardSave(_to_disk(state)), meta=ocp.args.JsonSave(meta))
        # If two scores are equal, Orbax keeps the newer checkpoint; the best one is the older. So only the best one gets its score.
        # force: save even if the step is not on Orbax's interval, as the last one may be.
        is_best = progress.best_step == progress.step
        metrics = {"score": progress.best_score if is_best else float("-inf")}
        self._manager.save(progress.step, args=args, metrics=metrics, force=True)

    def restore(self, state: TrainState, step: int) -> tuple[TrainState, Progress]:
        """Read the checkpoint of `step`, placed and shaped like `state`.

        Raises:
            InputError: the checkpoint belongs to another base or another adapter.
        """
        self._manager.wait_until_finished()
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        where = f"checkpoint {step} in {self._manager.directory}"
        if meta.pop("base_hash") != self._base_hash:
            raise InputError(
                f"{where} was trained on another base than the one model.name gives now; resume with the original base"
            )
        self._compare(state, step, where)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_disk(state))
        abstract["rng"] = self._key_of(step, abstract["rng"])
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        meta = {"micro_batch_tokens": None, **meta}  # older checkpoints do not have it, and a batch was one pass
        progress = Progress(**{key: meta[_ON_DISK.get(key, key)] for key in vars(Progress())})
        return _from_disk(restored["state"]), progress

    @contextmanager
    def kept(self) -> Iterator[None]:
        """If the block raises an error, wait until checkpoints are written: the end of the process would cut them off."""
        try:
            yield
        except BaseException:
            self._manager.wait_until_finished()
            raise

    def close(self) -> None:
        """Wait until all checkpoints are written, and release Orbax's resources."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _key_of(self, step: int, key: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """`key` with the generator of the checkpoint: a run may resume on another kind of device than it was trained on."""
        num_words = self._manager.item_metadata(step)["state"].tree["rng"].shape[-1]
        dtypes = [jax.eval_shape(lambda g=generator: jax.random.key(0, impl=g)).dtype for generator in GENERATORS]
        (dtype,) = [dtype for dtype in dtypes if dtype.itemsize == 4 * num_words]
        return jax.ShapeDtypeStruct(key.shape, dtype, sharding=key.sharding)

    def _compare(self, state: TrainState, step: int, where: str) -> None:
        # Orbax would silently cast a checkpoint of another dtype, so compare with the metadata on disk first.
        saved = self._manager.item_metadata(step)["state"].tree["adapters"]
        shapes = {
            jax.tree_util.keystr(p): (tuple(m.shape), str(m.dtype))
            for p, m in jax.tree_util.tree_leaves_with_path(saved)
        }
        wanted = {
            jax.tree_util.keystr(p): (a.shape, str(a.dtype))
            for p, a in jax.tree_util.tree_leaves_with_path(state.adapters)
        }
        for key in sorted(shapes.keys() | wanted.keys()):
            if shapes.get(key) != wanted.get(key):
                raise InputError(
                    f"{where} holds another adapter: {key} is {shapes.get(key)} there and {wanted.get(key)} in this configuration"
                )
