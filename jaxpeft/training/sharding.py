"""The only mesh: batches are split over all local devices, everything else is on each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft.errors import InputError


@dataclass(frozen=True)
class DataParallel:
    """Placement of arrays on a mesh with one axis, "data"."""

    mesh: jax.sharding.Mesh

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def shard(self, batch: Any) -> Any:
        """Split a batch's first axis over the devices."""
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec("data")))

    def check(self, batch_size: int, flag: str) -> None:
        """Raise InputError where `batch_size` rows cannot be split evenly."""
        if batch_size % self.mesh.size:
            near = max(batch_size // self.mesh.size, 1) * self.mesh.size
            raise InputError(f"{flag} {batch_size} cannot be split over {self.mesh.size} devices; {near} can")


def data_parallel() -> DataParallel:
    """A mesh over all local devices."""
    devices = jax.local_devices()
    # Not jax's default of explicit axes: Flax BERT raises ShardingTypeError under them.
    return DataParallel(jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices))
