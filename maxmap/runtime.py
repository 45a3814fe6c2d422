"""How JAX compiles and allocates: where programs are cached, how little some are optimised, that freed memory is kept.

JAX is imported by the functions that set something of it, so that commands without it start at once.

XLA allocates the temporary buffers of a program when it runs and frees them when it ends. On a CPU they come from the C
library, which takes blocks of that size from the kernel and returns each of them when it is freed. The kernel fills
every page with zeros when it is first written again. That takes a fifth of a training step, and more than half of it in
a virtual machine whose host takes the pages back too. An accelerator pools the memory of the device, so nothing has to
be set there.
"""

import ctypes
import importlib.metadata
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Parameters of glibc's mallopt(3) and their default values.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
_MMAP_MAX, _TRIM_THRESHOLD = 65536, 128 * 1024
SETTLING_STEPS = 10  # steps after which the process has the size that its steps need
GROWTH = 1.5  # factor of that size at which free memory is returned to the kernel

# By platform: what XLA compiles with where a program runs once. Of the others nothing was measured.
OPTIONS_TO_RUN_ONCE = {"cpu": {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}}

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def prepare_to_print() -> None:
    """Lets all text be printed; a command calls it first."""
    for stream in (sys.stdout, sys.stderr):  # a terminal in another encoding lacks some characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def prepare_to_compute() -> None:
    """Keeps freed memory and compiled programs, and silences logs; a command that uses JAX calls it first."""
    from absl import logging

    _leave_out_absent_tpus()
    freed_memory.keep()
    cache_programs()
    logging.set_verbosity(logging.ERROR)  # orbax logs every file that it writes


def cache_programs() -> None:
    """Caches compiled programs of every size in `$XDG_CACHE_HOME/maxmap/xla` (`~/.cache/maxmap/xla`).

    The key of a program holds everything that it was compiled from and for. JAX's own settings take precedence: a
    folder (`JAX_COMPILATION_CACHE_DIR`), no cache (`JAX_ENABLE_COMPILATION_CACHE=false`), its largest size in bytes
    (`JAX_COMPILATION_CACHE_MAX_SIZE`), and how many seconds a program must compile to be cached
    (`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`).
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # JAX's default skips what compiles in a second
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def jit_to_run_once(function: Callable[..., Any], out_shardings: Any = None) -> Callable[..., Any]:
    """`jax.jit` for a function that runs once, such as one that makes initial variables.

    Its program has some operations for each parameter, and waits for its compiler. XLA's for CPUs needs about half the
    time for little optimisation, and the random numbers are computed as fast. Elsewhere the default stays.

    Args:
      function: to be compiled.
      out_shardings: of its results, as for `jax.jit`.
    """
    import jax

    options = OPTIONS_TO_RUN_ONCE.get(jax.default_backend())
    return jax.jit(function, out_shardings=out_shardings, compiler_options=options)


def cache_folder() -> Path:
    """Returns the folder of what maxmap can make or download again: `$XDG_CACHE_HOME/maxmap` or `~/.cache/maxmap`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxmap"


class FreedMemory:
    """The memory that this process frees; after `keep` it stays with the process for the next allocation.

    The C library has one allocator for the process, so there is one object, `freed_memory`. Without `keep` it does
    nothing.
    """

    def __init__(self) -> None:
        self._keeping = False
        self._no_room = False  # for a second step from the start: no memory is kept since then
        self._steps: int | None = None  # since the last trim, None before the first
        self._usual_size = 0  # bytes, the largest size of the process while its steps settle
        self._trimmed_size = 0  # bytes, the size right after the last trim: without the memory of a step

    def keep(self) -> bool:
        """Tells the C library to keep what the process frees; returns whether it does.

        Call it in the main thread before JAX computes anything, and `trim_if_grown` in the main thread after every
        step: only the pool of that thread holds blocks of any size. For the same reason JAX then runs each program in
        the thread that calls it, and the call returns when the program has ended.

        It does nothing if JAX will use an accelerator (`JAX_PLATFORMS` names one, or is unset while there is a TPU or a
        plugin for another one), or if the C library is not glibc.
        """
        import jax

        if not sys.platform.startswith("linux") or not _computes_on_cpu():
            return False
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "gnu_get_libc_version"):
            return False
        # The alternative is one pool for all threads (M_ARENA_MAX), but then the threads wait for each other.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
        self._no_room, self._steps = False, None
        self._keeping = all([libc.mallopt(parameter, value) == 1 for parameter, value in settings])
        return self._keeping

    def trim_if_grown(self) -> None:
        """Returns free memory to the kernel if the process has grown because it keeps it; call it after every step.

        A new block may be a few bytes too large for the gap that the last one left. The process then grows by a whole
        block, and if it never returned memory, it would grow again and again. So it returns its free memory:

        - After the first step, because the compiler used most of it.
        - When the process is `GROWTH` times as large as its steps need.
        - When the machine has no room for what a step takes a second time. If that is so from the start, the process
          stops keeping memory, and returns what is free after every step.
        """
        if self._no_room:
            ctypes.CDLL(None).malloc_trim(0)  # of gaps between blocks that stay, which the allocator would keep
        if not self._keeping:
            return
        if self._steps is None:
            self._trim()
            return
        size, self._steps = _resident_bytes(), self._steps + 1
        if self._steps <= SETTLING_STEPS:
            self._usual_size = max(size, self._usual_size)
        no_room = available_bytes() < self._usual_size - self._trimmed_size
        if no_room and self._steps == 1:
            self._no_room = True
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, _MMAP_MAX)
            libc.mallopt(M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
            self._keeping = False
        if no_room or size > GROWTH * self._usual_size:
            self._trim()

    def _trim(self) -> None:
        time.sleep(0.2)  # XLA frees a program's buffers on another thread, shortly after its results are ready
        ctypes.CDLL(None).malloc_trim(0)
        self._steps, self._usual_size, self._trimmed_size = 0, 0, _resident_bytes()


freed_memory = FreedMemory()


def available_bytes() -> int:
    """Returns how much memory can still be allocated: on the machine, or in its control group if that is less."""
    free = _read_fields(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    try:
        current = int((_CONTROL_GROUP / "memory.current").read_text())
        used = current - _read_fields(_CONTROL_GROUP / "memory.stat")["inactive_file"]
        return min(free, int((_CONTROL_GROUP / "memory.max").read_text()) - used)
    except (OSError, ValueError):  # there is no control group, or its limit is "max"
        return free


def _read_fields(path: Path) -> dict[str, int]:
    """Reads a file with a name and a number in every line."""
    return {name: int(number) for name, number, *_ in map(str.split, path.read_text().splitlines())}


def _resident_bytes() -> int:
    """Returns the size of the process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _computes_on_cpu() -> bool:
    """Whether JAX will compute on the CPU; asking JAX would already start its backend."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not _may_have_tpu() and not importlib.metadata.entry_points(group="jax_plugins")


def _may_have_tpu() -> bool:
    """Whether a TPU can be used: its library is installed, and the system has files of devices that may be TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("*"))


def _leave_out_absent_tpus() -> None:
    """Keeps JAX from loading libtpu where it is installed to compile alone: it would print that it finds no TPU."""
    import jax

    installed = importlib.util.find_spec("libtpu") is not None
    if installed and not os.environ.get("JAX_PLATFORMS") and _computes_on_cpu():
        jax.config.update("jax_platforms", "cpu")
