"""Devices: the mesh, how state and batches lie on it. Nothing else in maxmap chooses a sharding.

A batch is split over all devices, the axes "data" and "fsdp" together. Every array of the state, be it a parameter, of
the optimizer or an average, is split over "fsdp" by its shape alone, and the same on every row of "data".
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from maxmap.errors import UserError

DATA, FSDP = "data", "fsdp"
HEARTBEAT = 60  # seconds without a sign of life after which the other processes of a job end too
SMALLEST = 4096  # values; to gather a smaller array costs more in latency than its copies cost in memory


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a job, one per host or per GPU, before anything else uses JAX.

    Without arguments it asks the environment: a TPU pod, Slurm's `srun` or Open MPI's `mpirun`; where there is none of
    these, the process is alone.

    Args:
      coordinator: host:port of the first process, which it opens.
      num_processes: of the job.
      process_id: from 0.

    Raises:
      UserError: only some of the three are given and the environment lacks the others, or the processes do not meet.
    """
    environment = os.environ
    if "OMPI_COMM_WORLD_SIZE" in environment:
        num_processes = num_processes or int(environment["OMPI_COMM_WORLD_SIZE"])
        process_id = int(environment["OMPI_COMM_WORLD_RANK"]) if process_id is None else process_id
        if num_processes == 1:
            return
        if coordinator is None and "OMPI_MCA_orte_hnp_uri" not in environment:
            raise UserError("this Open MPI does not tell where its first process runs: give --coordinator=HOST:PORT.")
    elif (coordinator, num_processes, process_id) == (None, None, None):
        tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
        slurm = "SLURM_STEP_NODELIST" in environment and int(tasks) > 1
        if not slurm and not _on_tpu_vm():
            return
    elif None in (coordinator, num_processes, process_id):
        raise UserError("give all of --coordinator=HOST:PORT, --num_processes and --process_id, or none of them.")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            # At its end, by an error too, a process waits for the others, which may be waiting for it.
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this job do not find each other ({' '.join(str(error).split())[:300]}): see whether all "
            "of them run and reach the coordinator's port."
        ) from error


def _on_tpu_vm() -> bool:
    """Whether this is a host of Google Cloud with TPUs, be it alone or in a pod."""
    devices = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return devices and importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in os.environ


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """Returns a mesh with the axes "data" and "fsdp".

    Args:
      data: copies of the state; -1 for as many as the devices allow.
      fsdp: devices that share a copy, each holding a part of it (fully sharded data parallelism, ZeRO: Rajbhandari et
        al. 2020). The batch is split over data * fsdp devices. One device is a mesh of 1 x 1.
    """
    available = jax.device_count()
    if not 1 <= fsdp <= available:
        raise UserError(f"config.mesh.fsdp is {fsdp}, but JAX sees {available} devices: at most that, 1 for none.")
    if data == -1:
        if available % fsdp:
            raise UserError(
                f"config.mesh.fsdp is {fsdp}, which does not divide {available} devices: give one of "
                f"{', '.join(str(n) for n in range(1, available + 1) if available % n == 0)}."
            )
        data = available // fsdp
    if not 1 <= data * fsdp <= available:
        times = f", times config.mesh.fsdp {fsdp}" if fsdp > 1 else ""
        raise UserError(
            f"config.mesh.data is {data}{times}, but JAX sees {available} devices: at most that, or -1 for all."
        )
    if jax.process_count() > 1 and data * fsdp != available:
        raise UserError(f"config.mesh.data is {data}, which leaves some of {available} devices idle: give -1 for all.")
    # Explicit axes, JAX's default, put shardings into types, which dropout's masks then break.
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, fsdp), (DATA, FSDP), axis_types=axis_types, devices=jax.devices()[: data * fsdp])


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def by_shape(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Where an array of the state lies: its longest axis that "fsdp" divides is split, the last of equals.

    An array with fewer than `SMALLEST` values, or with no such axis, is on every device.
    """
    parts = mesh.shape[FSDP]
    axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or math.prod(shape) < SMALLEST or not axes:
        return replicated(mesh)
    split = max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[FSDP if axis == split else None for axis in range(split + 1)]))


def scatter(tree: Any, mesh: Mesh | None) -> Any:
    """Inside of jit: every device keeps its part of each array of the state, or of its gradient."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, by_shape(x.shape, mesh)), tree)


def gather(tree: Any, mesh: Mesh | None) -> Any:
    """Inside of jit: every device gets all of each array."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated(mesh)), tree)


def check_batch(size: int, mesh: Mesh | AbstractMesh, what: str) -> None:
    """Raises UserError unless the devices divide a batch."""
    devices = mesh.size
    if size % devices:
        nearest = max(round(size / devices), 1) * devices
        raise UserError(f"{what} {size} does not divide over {devices} devices; the nearest that does is {nearest}.")


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Makes global arrays of this process's rows of a batch."""
    sharding = split_batch(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
