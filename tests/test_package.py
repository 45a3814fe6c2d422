"""What `pip install` gives: a wheel that loads, lists, converts and predicts without the checkout beside it."""

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from maxmap.convert.torch import to_torch
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.tiny import CLASSES, ROOT, write_image

MODEL = "maxvit_mini_32"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def pip(*arguments: object) -> None:
    finished = subprocess.run([*PIP, *map(str, arguments)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy so that no earlier build leaves a file in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("maxmap", "configs"):  # maxmap/configs is a link
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip("wheel", folder, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "out")
    (path,) = (folder / "out").iterdir()
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that holds the wheel, and sees this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


@pytest.fixture
def run(python, tmp_path):
    """A function that runs the installed Python in an empty folder, without a network."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {
        **outside,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "https_proxy": "http://127.0.0.1:9",  # the port that discards: nobody answers
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def run(*arguments: str, program: str = "python") -> subprocess.CompletedProcess:
        return subprocess.run(
            [python.with_name(program), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_the_wheel_has_every_file_of_the_package(wheel):
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "maxmap").rglob("*") if path.is_file()}
    wanted |= {f"maxmap/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("maxmap/")}
    assert found == {name for name in wanted if "__pycache__" not in name}


def test_the_installed_package_lists_and_loads(run, python):
    listed = run("-m", "maxmap", "list", "map_pit_*")
    assert listed.returncode == 0 and "map_pit_s " in listed.stdout, listed.stderr
    loaded = run("-c", "import maxmap; print(maxmap.__file__); maxmap.load('map_pit_s')")
    assert Path(loaded.stdout.strip()).is_relative_to(python.parents[1])  # the wheel's, not the checkout's
    assert loaded.stderr.splitlines()[-1].startswith("maxmap.errors.UserError: https://"), loaded.stderr
    assert "map_pit_s.pth.tar cannot be downloaded" in loaded.stderr


def test_the_installed_command_has_the_recipes(run):
    listed = run("recipes", program="maxmap")
    assert listed.returncode == 0 and "finetune:NAME\n" in listed.stdout, listed.stderr
    # A recipe that reads another's file, from a folder without configs/.
    told = run("train", "--config=map:maxvit_tiny", "--config.epochs=7", "--help_config", program="maxmap")
    assert "config.epochs = 7  (" in told.stdout and "config.batch_size = 4096  (" in told.stdout, told.stderr
    wrong = run("--wrong", program="maxmap")
    assert wrong.returncode == 2 and wrong.stderr.endswith("; maxmap --help lists what it takes.\n")


@pytest.mark.long
def test_the_installed_package_converts_and_predicts(run, tmp_path):
    model = create_model(MODEL, num_classes=3)
    shapes = eval_shape_of_init(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    weights = {key: np.ascontiguousarray(value) for key, value in to_torch(variables, model).items()}
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    write_image(tmp_path / "image.png", 0, 0, size=32)

    converted = run(
        *("-m", "maxmap", "convert", "weights.safetensors", "run", f"--model={MODEL}", "--classes=classes.txt")
    )
    assert converted.returncode == 0 and "written to run" in converted.stdout, converted.stderr
    predicted = run("-m", "maxmap", "predict", "run", "image.png")
    assert predicted.returncode == 0 and predicted.stdout.startswith("image.png: "), predicted.stderr
    assert all(name in predicted.stdout for name in CLASSES)
