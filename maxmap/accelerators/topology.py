"""Devices that are not here, for their compilers: TPU slices by libtpu, GPUs by JAX's CUDA plugin without a driver."""

import importlib.metadata
import importlib.util
import logging
import os
from typing import Any

import jax
from jax.experimental import topologies

from maxmap.accelerators.hardware import HARDWARE, size_of, slice_of
from maxmap.errors import UserError

# libtpu looks for a TPU and its host where nothing tells it, and locks the machine's TPUs for one process.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Without a GPU the compiler cannot try out which of several ways is the fastest.
_GPU_OPTIONS = {"xla_gpu_autotune_level": 0}
# What a GPU's compiler asks the driver for, as XLA writes it (xla/backends/gpu/target_config/specs).
_COMMON = """
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
"""
_GPUS = {
    "a100-80": f"""gpu_device_info {{ {_COMMON}
  shared_memory_per_core: 167936 core_count: 108 fpus_per_core: 64 memory_bandwidth: 2039000000000
  l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 84987740160
  shared_memory_per_block_optin: 166912 cuda_compute_capability {{ major: 8 minor: 0 }} }}
  platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
  device_description_str: "NVIDIA A100-SXM4-80GB" """,
    "h100-80": f"""gpu_device_info {{ {_COMMON}
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }} }}
  platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
  device_description_str: "NVIDIA H100 80GB HBM3" """,
}
_PACKAGES = {"tpu": ("libtpu", "libtpu", "aot-tpu"), "gpu": ("jax_cuda12_plugin", "jax-cuda12-plugin", "aot-gpu")}


def compiler(hardware: str) -> str:
    """Returns the name and version of the compiler for some hardware, a key of `HARDWARE`.

    Raises:
      UserError: it is not installed.
    """
    module, package, extra = _PACKAGES[HARDWARE[hardware].platform]
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"the compiler for {hardware} is not installed: pip install '.[{extra}]' in the checkout, or {package} as "
            "it belongs to this version of JAX."
        )
    name = package if module == "libtpu" else f"XLA of {package}"
    return f"{name} {importlib.metadata.version(package)}"


def devices_of(hardware: str, devices: int) -> list[jax.Device]:
    """Returns as many devices as programs can be compiled for; nothing can run on them.

    Call it before JAX computes anything in this process, which then computes on the CPU alone.

    Raises:
      UserError: no slice has so many devices, or the compiler is not installed.
    """
    grid = slice_of(hardware, devices)
    compiler(hardware)
    jax.config.update("jax_platforms", "cpu")
    if HARDWARE[hardware].platform == "gpu":
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)  # it logs that there is no driver
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=grid, topology=grid, target_config=_GPUS[hardware]
        )
        return list(found.devices)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if hardware in ("tpu-v4", "tpu-v5p"):
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as in training
    if size_of(grid.partition(":")[2]) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=grid, **options).devices)


def options_of(hardware: str) -> dict[str, Any]:
    """Returns the options that `jax.stages.Lowered.compile` takes for some hardware."""
    return _GPU_OPTIONS if HARDWARE[hardware].platform == "gpu" else {}
