"""The only mesh: batches are split over all devices of all processes, and everything else is replicated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft.errors import InputError


@dataclass(frozen=True)
class DataParallel:
    """Placement of arrays on a mesh with one axis, "data".

    If the mesh spans several processes, each process passes the same whole arrays and places the parts of its own devices.
    """

    mesh: jax.sharding.Mesh

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device."""
        return _put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def shard(self, batch: Any, *, axis: int = 0) -> Any:
        """Split `axis` of a batch's arrays over the devices."""
        return _put(batch, NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data")))

    def split(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Split the batch that `make` returns over the devices. `make` is a traced function of replicated arrays.

        Each device makes the whole batch and keeps its share. By itself the compiler would split the inputs of the batch
        and send parts of them between devices, although making the whole batch (integers: tokens and masks) costs next to
        nothing.
        """
        number = self.mesh.size
        if number == 1:
            return make

        def share(*arrays: Any) -> Any:
            index = jax.lax.axis_index("data")
            return jax.tree.map(
                lambda rows: jax.lax.dynamic_slice_in_dim(rows, index * (len(rows) // number), len(rows) // number),
                make(*arrays),
            )

        whole, split = PartitionSpec(), PartitionSpec("data")
        return jax.shard_map(share, mesh=self.mesh, in_specs=whole, out_specs=split, check_vma=False)

    def over_devices(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Run `function` on each device for its own rows of the arrays. For kernels that the compiler cannot split."""
        rows = PartitionSpec("data")
        return jax.shard_map(function, mesh=self.mesh, in_specs=rows, out_specs=rows, check_vma=False)

    @property
    def device(self) -> Any:
        """One of the devices, which are all of one kind."""
        return self.mesh.devices.flat[0]

    def fetch(self, array: jax.Array) -> np.ndarray:
        """The whole array in the memory of each process, even if it is split over processes."""
        # With a single process this is np.asarray.
        return multihost_utils.process_allgather(array, tiled=True)

    def local(self, tree: Any) -> Any:
        """A replicated tree for use by one process on its own: unchanged or, with several processes, copied to the host."""
        return jax.device_get(tree) if self.mesh.is_multi_process else tree

    def largest(self, value: int) -> jax.Array:
        """The largest `value` of all processes, int32, on all devices. No other method may be called with arguments that differ."""
        return _largest(self.shard(np.full(self.mesh.size, value, np.int32)))

    def replicated_shapes(self, tree: Any) -> Any:
        """`tree` of `jax.ShapeDtypeStruct`s, placed as `replicate` places arrays, to compile for devices that are absent."""
        return _placed(tree, NamedSharding(self.mesh, PartitionSpec()))

    def split_shapes(self, batch: Any, *, axis: int = 0) -> Any:
        """A batch of `jax.ShapeDtypeStruct`s, placed as `shard` places arrays."""
        return _placed(batch, NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data")))

    def check(self, batch_size: int, flag: str) -> None:
        """Raise InputError if `batch_size` rows (the value of `flag`) cannot be split evenly over the devices."""
        if batch_size % self.mesh.size:
            nearest = max(batch_size // self.mesh.size, 1) * self.mesh.size
            raise InputError(f"{flag} {batch_size} cannot be split over {self.mesh.size} devices; {nearest} can")


def data_parallel(devices: Sequence[Any] | None = None) -> DataParallel:
    """A mesh over `devices`, by default all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    # Auto, not jax's default of explicit axes, under which Flax BERT raises ShardingTypeError.
    return DataParallel(jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # Not device_put: before it copies, it sends the whole arrays between the processes to compare them.
    return jax.tree.map(lambda leaf: _put_local(leaf, sharding), tree)


def _put_local(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # it is on all devices already
        return jax.device_put(leaf, sharding)
    if sharding.is_fully_replicated:
        return jax.make_array_from_callback(np.shape(leaf), sharding, lambda _: leaf)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@jax.jit
def _largest(values: jax.Array) -> jax.Array:
    return jnp.max(values)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
