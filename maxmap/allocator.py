"""How the C library hands out memory, where JAX computes on the CPU.

XLA allocates the temporary buffers of a program when it runs and frees them when it ends. The C library takes blocks of
that size from the kernel and returns them every time, and the kernel clears every page again as it is first written: a
fifth to a quarter of a training step. On an accelerator the memory of the device is pooled, so nothing is done there.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import time
from pathlib import Path

# Parameters of glibc's mallopt(3), and what they are where nobody sets them.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
_MMAP_MAX, _TRIM_THRESHOLD = 65536, 128 * 1024
SETTLE = 10  # steps after which the process has the size that its steps need
GROWTH = 1.5  # of the process beyond that size, at which the gaps are given back
SHARE = 0.5  # of the machine's memory, above which nothing is kept any more
FIRST_SHARE = 0.3  # the same in the steps after a trim: a process that keeps may still double

_keeping = False
_steps: int | None = None  # since the last trim, None before the first
_usual = 0  # the largest size in bytes while they settled


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for the next allocation; returns whether it does.

    Call it before JAX computes anything: threads that have allocated keep the pools that they have; and call `relieve`
    after every step. It does nothing where JAX will use an accelerator (`JAX_PLATFORMS` names one, or one's plugin is
    installed and it is unset), nor where the C library is not glibc.
    """
    global _keeping
    if not sys.platform.startswith("linux") or not _computes_on_cpu():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # One pool for all threads, because only the first can hold blocks of any size; and nothing beside it.
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    _keeping = all([libc.mallopt(parameter, value) == 1 for parameter, value in settings])
    return _keeping


def relieve() -> None:
    """Gives back what is free, where keeping it has let the process grow; call it after every step.

    A block may miss the gap that its predecessor left by some bytes, so that a process which returns nothing grows by
    its largest block again and again. Where it comes to hold half of the machine's memory, it stops keeping. What the
    first step leaves is not judged but given back: most of it is what the compiler used.
    """
    global _keeping, _steps, _usual
    if not _keeping:
        return
    if _steps is None:
        _trim()
        return
    size, _steps = _resident(), _steps + 1
    full = size > (FIRST_SHARE if _steps <= 2 else SHARE) * memory()
    if _steps <= SETTLE:
        _usual = max(size, _usual)
    if full:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, _MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        _keeping = False
    if full or size > GROWTH * _usual:
        _trim()


def _trim() -> None:
    global _steps, _usual
    time.sleep(0.2)  # XLA frees the buffers of a program just after its results are ready, on a thread of its own
    ctypes.CDLL(None).malloc_trim(0)
    _steps, _usual = 0, 0


def memory() -> int:
    """Returns the bytes of memory that this process may use: the machine's, or its control group's if that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # there is no such group, or it says "max"
        return machine


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _computes_on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return importlib.util.find_spec("libtpu") is None and not importlib.metadata.entry_points(group="jax_plugins")
