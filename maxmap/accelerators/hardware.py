"""The accelerators that plans know, by their makers' figures, and the groups in which they are sold."""

from dataclasses import dataclass

from maxmap.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """One device, by its maker's figures.

    Attributes:
      flops: multiply-adds times two per second, bfloat16, at the peak.
      memory: bytes.
      bandwidth: bytes per second that it sends to the others, in the job's network as a whole.
      memory_bandwidth: bytes per second between it and its memory.
      clock: cycles per second of a TPU's compute units; None for a GPU, whose compiler estimates no cycles.
    """

    flops: float
    memory: float
    bandwidth: float
    memory_bandwidth: float
    clock: float | None = None

    @property
    def platform(self) -> str:
        """What programs are compiled for: "tpu" or "gpu"."""
        return "tpu" if self.clock else "gpu"


HARDWARE = {
    "tpu-v4": Hardware(275e12, 32e9, 300e9, 1.228e12, 1.05e9),
    "tpu-v5e": Hardware(197e12, 16e9, 200e9, 0.82e12, 1.5e9),
    "tpu-v5p": Hardware(459e12, 95e9, 600e9, 2.765e12, 1.75e9),
    "tpu-v6e": Hardware(918e12, 32e9, 448e9, 1.64e12, 1.75e9),
    # GPUs of many hosts are joined by one port of 200 or 400 Gbit/s each; inside of a host NVLink is ten times as fast.
    "a100-80": Hardware(312e12, 80e9, 25e9, 2.04e12),
    "h100-80": Hardware(989e12, 80e9, 50e9, 3.35e12),
}

# Slices of v5e and v6e are rectangles of up to 16 x 16 chips; v4 and v5p are boxes of hosts with 2 x 2 x 1 chips.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BOXES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "4x4x12", "4x8x12", "8x8x12"),
    *("8x8x16", "8x16x16", "16x16x16", "8x12x16", "12x12x12", "12x16x16", "8x12x12", "16x16x24"),
)
GPUS_PER_HOST = 8


def slice_of(hardware: str, devices: int) -> str:
    """Returns the name of the smallest group of just so many devices, such as "v5e:4x4" or, of GPUs, "1x2x8".

    Raises:
      UserError: there is no such group; the message names the nearest that there are.
    """
    if HARDWARE[hardware].platform == "gpu":
        hosts, rest = divmod(devices, GPUS_PER_HOST)
        if hosts and rest:
            raise _no_slice(hardware, devices, [hosts * GPUS_PER_HOST, (hosts + 1) * GPUS_PER_HOST])
        return f"1x{max(hosts, 1)}x{GPUS_PER_HOST if hosts else devices}"
    kind = hardware.removeprefix("tpu-")
    sizes = {size_of(grid): grid for grid in (FLAT if kind in ("v5e", "v6e") else BOXES)}
    if devices not in sizes:
        below = [size for size in sizes if size < devices]
        above = [size for size in sizes if size > devices]
        raise _no_slice(hardware, devices, [*([max(below)] if below else []), *([min(above)] if above else [])])
    return f"{kind}:{sizes[devices]}"


def size_of(grid: str) -> int:
    """Returns the number of devices of a grid such as "4x4"."""
    size = 1
    for side in grid.split("x"):
        size *= int(side)
    return size


def _no_slice(hardware: str, devices: int, near: list[int]) -> UserError:
    return UserError(
        f"no group of {hardware} has {devices} devices to compile for: give --devices={' or '.join(map(str, near))}."
    )
