"""Eight CPU devices, strict JAX, and what several tests share."""

import importlib.metadata
import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers fill the cores already: no team of threads inside each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA's pool has as many threads as cores, but at least one per device. Where steps with a collective queue up, eight
# threads on two cores can all wait for a ninth until XLA aborts (jaxlib 0.10.2); sixteen do not.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of what a test starts, too: libtpu is there to compile, not to run
# XLA's older emitters compile gradients in about half the time, and compiling is what the tests wait for. What a test
# starts inherits them, so that both sides of a bitwise comparison compile alike. XLA aborts at a flag that it does not
# know, and after jaxlib 0.10 it does not know this one.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import jax
import pytest

from maxmap import operations

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time goes into compiling: keep the results. The key holds the program, so a changed program compiles.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
if hasattr(tarfile, "data_filter"):  # Python 3.11 has it from 3.11.4 on; newer ones warn where none is chosen
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): injects a fault; the run ends with a table of them")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    mark = item.get_closest_marker("fault")
    if mark and report.when == "call" and not report.skipped:
        report.user_properties.append(("fault", mark.args[0]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A table: fault, tries, survived, lost. Nothing may be lost."""
    faults: dict[str, list[int]] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == "fault":
                    faults.setdefault(value, [0, 0])[outcome == "failed"] += 1
    if faults:
        width = max(map(len, faults))
        terminalreporter.section("faults that were injected")
        terminalreporter.write_line(f"{'fault':{width}}  tries  survived  lost")
        for name, (survived, lost) in sorted(faults.items()):
            terminalreporter.write_line(f"{name:{width}}  {survived + lost:5}  {survived:8}  {lost:4}")


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs one test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def tiny_models() -> Iterator[None]:
    """`create_model` makes the small network of tests/tiny.py for every room that calls it."""
    from tests.tiny import compile_quickly, create_tiny, use_models  # imports JAX's users, after JAX is configured

    with compile_quickly(), pytest.MonkeyPatch.context() as patch:
        use_models(create_tiny, patch)
        yield


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """XLA optimises little; see tests/tiny.py."""
    from tests.tiny import compile_quickly

    with compile_quickly():
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images, `{train,val}/<class>/<number>.png`; see tests/tiny.py."""
    from tests.tiny import write_folder

    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def plain_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's own convolutions, which trace and compile faster; tests/test_operations.py shows that they are equal."""
    monkeypatch.setitem(operations.IMPLEMENTATIONS, "cpu", operations.IMPLEMENTATIONS["default"])


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder with the numbers of the reference models."""
    return ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs, `imagenet_sample/val/<wnid>/*.JPEG`: 32 classes, one full-size image each.

    Taken out of `../shared/data`, which does not ship with the repository: elsewhere the test is skipped.
    """
    archive = ROOT.parent / "shared" / "data" / "imagenet_sample.tar"
    if not archive.is_file():
        pytest.skip("needs shared/data/imagenet_sample.tar beside the repository")
    folder = tmp_path_factory.mktemp("shared")
    with tarfile.open(archive) as tar:
        images = (member for member in tar if member.isfile())
        tar.extractall(folder, itertools.islice(images, 32))
    return folder
