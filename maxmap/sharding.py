"""Devices: the mesh, how state and batches lie on it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maxmap.errors import UserError

DATA = "data"


def make_mesh(*, data: int = -1) -> Mesh:
    """Returns a mesh with one axis, "data", over which batches are split.

    Args:
      data: number of devices; -1 for all that JAX sees. One device is a mesh of one.
    """
    available = jax.device_count()
    data = available if data == -1 else data
    if not 1 <= data <= available:
        raise UserError(f"config.mesh.data is {data}, but JAX sees {available} devices: at most that, or -1 for all.")
    if jax.process_count() > 1 and data != available:
        raise UserError(f"config.mesh.data is {data}, which leaves some of {available} devices idle: give -1 for all.")
    # Explicit axes, JAX's default, put shardings into types, which dropout's masks then break.
    return jax.make_mesh((data,), (DATA,), axis_types=(AxisType.Auto,), devices=jax.devices()[:data])


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def check_batch(size: int, mesh: Mesh, what: str) -> None:
    """Raises UserError unless the devices divide a batch."""
    devices = mesh.devices.size
    if size % devices:
        nearest = max(round(size / devices), 1) * devices
        raise UserError(f"{what} {size} does not divide over {devices} devices; the nearest that does is {nearest}.")


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Makes global arrays of this process's rows of a batch."""
    sharding = split_batch(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
