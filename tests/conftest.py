"""Eight CPU devices, strict JAX, and what several tests share."""

import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers fill the cores already: no team of threads inside each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# XLA's pool has as many threads as cores, but at least one per device. Where steps with a collective queue up, eight
# threads on two cores can all wait for a ninth until XLA aborts (jaxlib 0.10.2); sixteen do not.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of what a test starts, too: libtpu is there to compile, not to run
# Compiling is what the tests wait for. XLA's older emitters compile gradients in about half the time; a program in one
# piece, not in 32 for threads that are not there, takes a fifth less time. What a test starts inherits both flags, so
# that both sides of a bitwise comparison compile alike. XLA aborts at a flag that it does not know, and after jaxlib
# 0.10 it does not know the first.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), *flags)))

import jax
import pytest
from PIL import Image

from maxmap import operations

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time goes into compiling: keep what other tests compile again, as training loops do. The key holds the
# program, so a changed program compiles.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# Tracing makes many objects that last: by Python's default a tenth of the time goes into looking for cycles among them.
gc.set_threshold(100_000, 50, 10)
if hasattr(tarfile, "data_filter"):  # Python 3.11 has it from 3.11.4 on; newer ones warn where none is chosen
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name): injects a fault; the run ends with a table of them")
    config.addinivalue_line("markers", "long: `make long` runs it, `make test` does not")


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # modules, and the tests themselves: no cycles of theirs will ever be free


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


@pytest.fixture(scope="session", autouse=True)
def blank_curves() -> Iterator[None]:
    """Runs leave a blank `curves.png`: drawing takes as long as training a small network. test_report.py draws."""
    from maxmap.train import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda metrics, picture: Image.new("L", (1, 1)).save(picture))
        yield


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
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of ConvNeXt with a narrow MAP head stands for `map_maxvit_mini_32`, which the documents train."""
    from maxmap import models

    name = "map_maxvit_mini_32"
    head = {"channels": 8, "level": 0, "branches": 1, "gram_channels": 4, "gram_groups": 2, "heads": 2}
    fields = {"image_size": 32, "depths": (1,), "embed_dim": (8,)}
    described = dataclasses.replace(
        models.MODELS["convnext_tiny"], head={**models.MODELS[name].head, **head}, fields=fields
    )
    monkeypatch.setitem(models.MODELS, name, described)


@pytest.fixture
def small_mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrower `maxvit_mini_32` of one block a stage, with maps of the same sizes, for documents that use that."""
    from maxmap import models

    name = "maxvit_mini_32"
    fields = {"stem_width": (8, 8), "embed_dim": (8, 96), "depths": (1, 1), "transformer": {"head_dim": 8}}
    described = models.MODELS[name]
    monkeypatch.setitem(models.MODELS, name, dataclasses.replace(described, fields={**described.fields, **fields}))


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


@pytest.fixture(scope="session")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of a small network with two branches and random weights, on classes and files with odd names.

    Its folder has no evaluation yet, so whoever evaluates it takes a copy.
    """
    from maxmap import checkpoint, create_model
    from maxmap.config import bind
    from tests.test_grid import BACKBONES, HEAD_FIELDS
    from tests.tiny import settings_for, write_image
    from tests.zoo import filled

    root, classes = tmp_path_factory.mktemp("odd"), ['<b>&"', "naïve", "two\nlines"]
    for i in range(24):
        split, name = ("train", "val")[i % 2], classes[i % 3]
        write_image(root / "photos" / split / name / f"<i>{i:02}'é\n.png", i, i % 3, size=40)
    name, fields = BACKBONES["convnext"]
    given = {"name": name, **fields, "head": {"name": "map", **HEAD_FIELDS["map"], "branches": 2}}
    config = settings_for(root / "photos", model=given, data__image_size=32, mesh__data=-1)
    model = create_model(**given, num_classes=3)
    variables = jax.tree.map(lambda leaf: leaf.astype("float32"), filled(model, (32, 32)))
    info = {
        "model": {**given, "num_classes": 3},
        "classes": sorted(classes),
        "preprocessing": bind(config).data().preprocessing,
        "config": dict(bind(config).values),
        "step": 6,
        "weights": "raw",
    }
    checkpoint.write_variables(root / "run", variables, json.loads(json.dumps(info)))
    rows = [{"kind": "train", "step": step, "epoch": step / 3, "loss": 2.0 / step} for step in (2, 4, 6)]
    rows = [row | {"learning_rate": 0.01, "images_per_second": 120.0, "waiting_for_data": 0.25} for row in rows]
    rows.append({"kind": "eval", "step": 6, "epoch": 2.0, "loss": 1.0, "top1": 50.0, "top5": 100.0})
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(folder=root / "run", photos=root / "photos", classes=info["classes"])
