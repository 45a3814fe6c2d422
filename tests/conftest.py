"""Eight CPU devices, strict JAX, and what several tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER:  # the workers already fill the cores: keep OpenBLAS and OpenMP from starting a team of threads in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of what the tests do; one folder per worker, since entries are not written atomically.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax" / (WORKER or "main")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs one test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder with the numbers of the reference models."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with cifar10/ and imagenet_sample/, unpacked; the test is skipped where it is not there."""
    folder = Path(os.environ.get("MAXMAP_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not any((folder / name).is_dir() for name in ("cifar10", "imagenet_sample")):
        pytest.skip(f"no unpacked images in {folder}")
    return folder
