"""The mesh of devices, and how state and batches are sharded on it. No other module chooses a sharding.

A batch is split over all devices, so over the axes "data" and "fsdp" together. The state is split over "fsdp" and
replicated over "data". The shape of an array alone decides along which axis it is split, be it a parameter, an average
or part of the optimizer's state.
"""

import contextlib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from maxmap.errors import UserError
from maxmap.ranges import Count, CountOrZero, Range, check_arguments

DATA, FSDP = "data", "fsdp"
HEARTBEAT_TIMEOUT = 60  # seconds without a sign of life from a process, after which the others of its job end too
# Values. An array whose part on a device would be smaller is replicated: its copies take little memory, gathering its
# parts would take long, and a TPU scatters only what fills two tiles of 16 x 128 on each device.
MIN_PART = 4096
LANES = 128  # of a TPU's tile: the length that its last axis is padded to
COMBINED = 2**18  # bytes of a gathered array, below which it is gathered together with others of its shape


def initialize_processes(
    coordinator: str | None = None, num_processes: Count | None = None, process_id: CountOrZero | None = None
) -> None:
    """Joins the processes of a job, one per host or per GPU; call it before anything else uses JAX.

    Without arguments it reads them from the environment of a TPU pod, of Slurm's `srun` or of Open MPI's `mpirun`. If
    there is no such environment, the process trains alone.

    Args:
      coordinator: host:port where the first process listens.
      num_processes: number of processes in the job.
      process_id: number of this process, from 0.

    Raises:
      UserError: some of the three are missing here and in the environment, or the processes do not find each other.
    """
    environment = os.environ
    if "OMPI_COMM_WORLD_SIZE" in environment:
        num_processes = num_processes or int(environment["OMPI_COMM_WORLD_SIZE"])
        process_id = int(environment["OMPI_COMM_WORLD_RANK"]) if process_id is None else process_id
        if num_processes == 1:
            return
        if coordinator is None and "OMPI_MCA_orte_hnp_uri" not in environment:
            raise UserError("this Open MPI does not say where its first process runs: give --coordinator=HOST:PORT.")
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
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            # A process that ends waits for the others; after an error they may be waiting for it.
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this job do not find each other ({' '.join(str(error).split())[:300]}): check that all "
            "of them run and can reach the coordinator's port."
        ) from error


def _on_tpu_vm() -> bool:
    """Whether this is a Google Cloud host with TPUs, alone or in a pod."""
    devices = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return devices and importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in os.environ


def make_mesh(
    devices: Sequence[jax.Device] | None = None, *, data: Annotated[int, Range(at_least=-1)] = -1, fsdp: Count = 1
) -> Mesh:
    """Returns a mesh with the axes "data" and "fsdp".

    Args:
      devices: to choose from; None for those of JAX's backend.
      data: copies of the state; -1 for as many as the devices allow.
      fsdp: devices that share a copy, each holding a part of it (fully sharded data parallelism, ZeRO: Rajbhandari et
        al. 2020). The batch is split over data * fsdp devices. One device is a mesh of 1 x 1.

    Raises:
      UserError: the devices do not allow such a mesh.
    """
    check_arguments(make_mesh, "mesh", locals())
    devices = jax.devices() if devices is None else devices
    available = len(devices)
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
    # With explicit axes, JAX's default, shardings are part of types, and dropout's masks do not type-check.
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, fsdp), (DATA, FSDP), axis_types=axis_types, devices=devices[: data * fsdp])


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def state_sharding(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of an array of the state.

    The last axis but one is split; the last one in its stead if that is shorter than `LANES` and the other is not; the
    longest axis where the devices of "fsdp" do not divide that one. An array that has no axis which they divide, or
    whose parts would have fewer than `MIN_PART` values, is replicated.

    This is how a TPU can scatter gradients while it sums them. The axis that is left whole is the one that it keeps in
    its lanes; of arrays that are split along the lanes, it sums the whole on every device and cuts it afterwards.
    """
    parts = mesh.shape[FSDP]
    axes = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or math.prod(shape) < MIN_PART * parts or not axes:
        return replicated(mesh)
    tall = len(shape) > 1 and shape[-1] < LANES <= shape[-2]
    wanted = len(shape) - (1 if tall else 2)
    split = wanted if wanted in axes else max(axes, key=lambda axis: (shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[FSDP if axis == split else None for axis in range(split + 1)]))


def shard(tree: Any, mesh: Mesh | None) -> Any:
    """Shards arrays of the state or of its gradient inside jit, so that every device keeps its part of each.

    Without a mesh, it returns the arrays unchanged.
    """
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, state_sharding(x.shape, mesh)), tree)


def gather(tree: Any, mesh: Mesh | None) -> Any:
    """Gathers sharded arrays inside jit, so that every device has all of each.

    Small arrays of one shape and type are gathered at once, because starting takes longer than sending them; large ones
    each on their own, so that computing can go on in between. Without a mesh, it returns the arrays unchanged.
    """
    if mesh is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    alike: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        split = not state_sharding(leaf.shape, mesh).is_fully_replicated
        small = split and leaf.size * leaf.dtype.itemsize < COMBINED
        alike.setdefault((leaf.shape, leaf.dtype) if small else place, []).append(place)
    for places in alike.values():
        if len(places) == 1:
            leaves[places[0]] = jax.lax.with_sharding_constraint(leaves[places[0]], replicated(mesh))
            continue
        spec = state_sharding(leaves[places[0]].shape, mesh).spec
        stack = jnp.stack([leaves[place] for place in places])  # [count, *shape]
        stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, PartitionSpec(None, *spec)))
        stack = jax.lax.with_sharding_constraint(stack, replicated(mesh))
        for number, place in enumerate(places):
            leaves[place] = stack[number]
    return jax.tree.unflatten(structure, leaves)


def traced_on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Traces functions whose batch is split over a mesh: kernels that are written by hand have to know that.

    Args:
      mesh: of the batch; None for one device.

    Returns:
      The context.
    """
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def check_batch(size: int, mesh: Mesh | AbstractMesh, what: str) -> None:
    """Raises UserError unless the number of devices divides the size of a batch, which the message calls `what`."""
    devices = mesh.size
    if size % devices:
        nearest = max(round(size / devices), 1) * devices
        raise UserError(f"{what} {size} does not divide over {devices} devices; the nearest that does is {nearest}.")


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Makes global arrays from the rows of a batch that this process has read."""
    sharding = split_batch(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def gather_processes(column: np.ndarray) -> np.ndarray:
    """Returns the rows of all processes, one process after another, of numbers or truths `[B, ...]`."""
    if jax.process_count() == 1:
        return column
    sent = column if column.dtype == np.float32 else column.astype(np.int32)  # what JAX sends as it is
    return np.asarray(multihost_utils.process_allgather(sent, tiled=True)).astype(column.dtype)
