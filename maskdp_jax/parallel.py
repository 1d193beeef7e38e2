"""Devices: the mesh, batches laid over it, and a step mapped to it by `shard_map` or `pmap`."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maskdp.errors import UserError
from maskdp_jax.config import ParallelConfig

AXIS = "data"


def join() -> None:
    """Joins the other processes of this job, if there are any: those of `launch/local`, or the tasks of a Slurm step.

    Call it before anything asks for a device.
    """
    if "MASKDP_PROCESSES" in os.environ:
        processes, index = int(os.environ["MASKDP_PROCESSES"]), int(os.environ["MASKDP_PROCESS"])
        jax.distributed.initialize(os.environ["MASKDP_COORDINATOR"], processes, index)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        jax.distributed.initialize()


def mesh(config: ParallelConfig) -> Mesh:
    """A mesh of one axis, `data`, over the devices that `config` asks for.

    Raises:
        UserError: there are fewer devices.
    """
    devices = jax.devices()
    count = config.devices or len(devices)
    if count > len(devices) or (jax.process_count() > 1 and count != len(devices)):
        raise UserError(f"parallel.devices: {count}, expected at most {len(devices)}, or all where there are processes")
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


class Layout:
    """How state and batches lie on the mesh.

    Attributes:
        rows: every batch is padded to a multiple of it.
        mesh: of one axis.
    """

    def __init__(self, config: ParallelConfig):
        self.mesh, self._by_pmap, self._micro = mesh(config), config.device_map == "pmap", config.microbatch
        self._devices = self.mesh.size

    def padded(self, slots: int) -> int:
        """The least number of rows, not below `slots`, that devices and microbatches divide."""
        multiple = self._devices * (min(self._micro, -(-slots // self._devices)) or 1)
        return -(-slots // multiple) * multiple

    def microbatch(self, rows: int) -> int | None:
        """Microbatch of a device that holds `rows` rows, None for all at once."""
        return min(self._micro, rows) or None

    def local(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of an array over the rows of a batch."""
        share = len(rows) // jax.process_count()
        return rows[jax.process_index() * share : (jax.process_index() + 1) * share]

    def replicate(self, tree: Any) -> Any:
        """`tree`, equal on all processes, on every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i]), tree
        )

    def shard(self, tree: Any) -> Any:
        """A batch, of which each process holds its own rows, laid over the devices by rows."""
        if self._by_pmap:
            here = self._devices // jax.process_count()
            return jax.tree.map(lambda x: x.reshape(here, -1, *x.shape[1:]), tree)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, sharding), tree)

    def mapped(self, step: Callable) -> Callable:
        """`step(state, batch, key) -> (state, sums, rows)`, run on every device with the collective axis `data`.

        `state`, `key` and `sums` are equal on all devices; `batch` and `rows` are split by rows.
        """
        if self._by_pmap:
            devices = list(self.mesh.devices.flat)
            return jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=(None, None, 0), devices=devices)
        whole, split = PartitionSpec(), PartitionSpec(AXIS)
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=(whole, split, whole), out_specs=(whole, whole, split))
        return jax.jit(mapped, donate_argnums=0)


def varying(tree: Any) -> Any:
    """`tree` as this device's own copy, so that `grad` does not sum its gradient over devices before it is clipped."""
    return jax.tree.map(lambda x: jax.lax.pcast(x, (AXIS,), to="varying"), tree)
