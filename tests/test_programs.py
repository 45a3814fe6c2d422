"""A checkpoint as a program: it runs in a process without maxmap, for any number of images, and says what it takes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap import checkpoint, create_model
from maxmap.__main__ import main
from maxmap.data.augment import normalize
from maxmap.models import average
from maxmap.programs import PLATFORMS
from tests.test_grid import BACKBONES, HEAD_FIELDS
from tests.tiny import CLASSES, preprocessing
from tests.zoo import initial_values, quick

# Of every program that is named, reads images of a file and writes logits into another, with JAX and NumPy alone.
RUN = """
import sys, jax, jax.export, numpy as np
for name in sys.argv[1:]:
    call = jax.export.deserialize(open(name + ".stablehlo", "rb").read()).call
    with np.load(name + ".npz") as file:
        np.savez(name + "_logits.npz", **{batch: call(file[batch]) for batch in file})
assert not [name for name in sys.modules if name.split(".")[0] in ("maxmap", "flax")]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small MaxViT with a MAP head as a checkpoint, and the function that its program has to be."""
    name, fields = BACKBONES["maxxvit"]
    given = {"name": name, **fields, "head": {"name": "map", **HEAD_FIELDS["map"]}, "num_classes": 3}
    model = create_model(**given)
    variables = initial_values(model, jnp.zeros((1, 16, 16, 3)))
    variables = jax.tree.map(lambda x: x + 0.05 * np.random.default_rng(x.size).random(x.shape, np.float32), variables)
    info = {"model": given, "classes": list(CLASSES), "preprocessing": preprocessing() | {"image_size": 16}}
    folder = tmp_path_factory.mktemp("program")
    checkpoint.write_variables(folder / "made", variables, info | {"step": 0, "weights": "raw"})
    return folder, info, lambda images: average(quick(model.apply, variables, images))


def test_a_program_runs_without_maxmap(made, capsys, quick_compilation):
    """For three platforms in one file, with batches of 1 and 3; and for a CPU alone, from pixels."""
    folder, info, wanted = made
    rng = np.random.default_rng(0)
    pixels = {f"of_{count}": rng.integers(0, 256, (count, 16, 16, 3), np.uint8) for count in (1, 3)}
    images = {
        name: np.asarray(normalize(x, *(info["preprocessing"][k] for k in ("mean", "std"))))
        for name, x in pixels.items()
    }
    programs = {"all": (images, []), "pixels": (pixels, ["--pixels", "--platforms", "cpu"])}
    for name, (inputs, options) in programs.items():
        program = folder / f"{name}.stablehlo"
        assert main(["export", str(folder / "made"), str(program), *options]) == 0
        assert capsys.readouterr().out.startswith(f"{program}: ")
        np.savez(folder / f"{name}.npz", **inputs)
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", RUN, *programs]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for name, (_, options) in programs.items():
        with np.load(folder / f"{name}_logits.npz") as logits:
            for batch, normalised in images.items():
                np.testing.assert_allclose(logits[batch], wanted(normalised), rtol=2e-4, atol=2e-5)
        about = json.loads((folder / f"{name}.json").read_text())
        assert about["classes"] == list(CLASSES) and about["preprocessing"] == info["preprocessing"]
        assert about["platforms"] == (["cpu"] if options else list(PLATFORMS))
        assert about["input"].startswith("uint8 [B, 16, 16, 3]" if options else "float32 [B, 16, 16, 3]")
    exported = jax.export.deserialize((folder / "all.stablehlo").read_bytes())
    assert exported.platforms == PLATFORMS


def test_mistakes_are_one_sentence(made, capsys):
    folder = made[0]
    there = folder / "there.stablehlo"
    there.write_text("")

    def says(*argv):
        assert main(["export", str(folder / "made"), *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "is there already: give another name, or --overwrite" in says(there)
    assert "leave out --dialect" in says(folder / "a.stablehlo", "--dialect=timm")
    assert "belongs to a program: give a name in .stablehlo or .onnx" in says(folder / "a.safetensors", "--pixels")
    assert "has no averaged weights" in says(folder / "a.stablehlo", "--ema")
    assert not (folder / "a.stablehlo").exists()
