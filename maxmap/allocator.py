"""How the C library hands out memory, where JAX computes on the CPU.

XLA allocates the temporary buffers of a program when it runs and frees them when it ends. The C library takes blocks of
that size from the kernel and returns them every time, and the kernel clears every page again as it is first written: a
fifth of a training step, or more than half of it in a virtual machine whose host takes the pages back as well. On an
accelerator the memory of the device is pooled, so nothing is done there.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import time
from pathlib import Path

import jax

# Parameters of glibc's mallopt(3), and what they are where nobody sets them.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
_MMAP_MAX, _TRIM_THRESHOLD = 65536, 128 * 1024
SETTLE = 10  # steps after which the process has the size that its steps need
GROWTH = 1.5  # of the process beyond that size, at which the gaps are given back

_GROUP = Path("/sys/fs/cgroup")
_keeping = False
_steps: int | None = None  # since the last trim, None before the first
_usual = 0  # the largest size in bytes while they settled
_floor = 0  # the size after the last trim: what steps leave alone


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for the next allocation; returns whether it does.

    Call it before JAX computes anything, and `relieve` after every step, both in the main thread, because only that
    thread's pool holds blocks of any size. So programs are computed by the thread that calls them, and a call returns
    when its program is done. It does nothing where JAX will use an accelerator (`JAX_PLATFORMS` names one, or one's
    plugin is installed and it is unset), nor where the C library is not glibc.
    """
    global _keeping
    if not sys.platform.startswith("linux") or not _computes_on_cpu():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # One pool for all threads would do it as well, but then those that compile and those that compute wait for it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    _keeping = all([libc.mallopt(parameter, value) == 1 for parameter, value in settings])
    return _keeping


def relieve() -> None:
    """Gives back what is free, where keeping it has let the process grow; call it after every step.

    A block may miss the gap that its predecessor left by some bytes, so that a process which returns nothing grows by
    its largest block again and again. So there always has to be room for what a step takes a second time: where there
    is not, it gives back, and if that is so from the start, it stops keeping. What the first step leaves is not judged
    but given back, because most of it is what the compiler used.
    """
    global _keeping, _steps, _usual
    if not _keeping:
        return
    if _steps is None:
        _trim()
        return
    size, _steps = _resident(), _steps + 1
    if _steps <= SETTLE:
        _usual = max(size, _usual)
    short = available() < _usual - _floor
    if short and _steps == 1:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        _keeping = False
    if short or size > GROWTH * _usual:
        _trim()


def _trim() -> None:
    global _steps, _usual, _floor
    time.sleep(0.2)  # XLA frees the buffers of a program just after its results are ready, on a thread of its own
    ctypes.CDLL(None).malloc_trim(0)
    _steps, _usual, _floor = 0, 0, _resident()


def available() -> int:
    """Returns the bytes of memory that could still be taken: the machine's, or its control group's if that is less."""
    free = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    try:
        taken = int((_GROUP / "memory.current").read_text()) - _numbers(_GROUP / "memory.stat")["inactive_file"]
        return min(free, int((_GROUP / "memory.max").read_text()) - taken)
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return free


def _numbers(path: Path) -> dict[str, int]:
    """Reads lines of a name and a number."""
    return {name: int(number) for name, number, *_ in map(str.split, path.read_text().splitlines())}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _computes_on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return importlib.util.find_spec("libtpu") is None and not importlib.metadata.entry_points(group="jax_plugins")
