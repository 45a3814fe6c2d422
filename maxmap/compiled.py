"""Where the programs that JAX compiles are kept, so that the same command starts at once the next time."""

import os
from pathlib import Path

import jax


def keep() -> None:
    """Keeps compiled programs, of every size, in `$XDG_CACHE_HOME/maxmap/xla` (`~/.cache/maxmap/xla`).

    The key of a program holds all that it was compiled from and for. JAX's own settings come first: a folder
    (`JAX_COMPILATION_CACHE_DIR`), no cache at all (`JAX_ENABLE_COMPILATION_CACHE=false`), its largest size in bytes
    (`JAX_COMPILATION_CACHE_MAX_SIZE`), and the seconds of compiling from which on a program is kept.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxmap" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # JAX leaves out what compiles within a second
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
