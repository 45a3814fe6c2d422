"""Networks as ONNX graphs: the logits of every family with every head; what a file says, and what is refused."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from maxmap import checkpoint
from maxmap.__main__ import main
from maxmap.data.augment import normalize
from maxmap.models import FAMILIES, average, create_model
from maxmap.onnx import export, proto
from maxmap.onnx import lower as lowering
from maxmap.onnx.lower import lower
from maxmap.onnx.session import SAID, Network
from maxmap.shapes import eval_shape_of_init
from tests.marks import cases
from tests.test_commands import mistake
from tests.test_grid import BACKBONES, heads_on, small
from tests.tiny import CLASSES, preprocessing, write_folder
from tests.zoo import quick

BATCHES = (1, 3, 8)


def written(path, function, variables, size):
    """Writes the graph of a function and checks it by ONNX's own rules; returns the model."""
    image = jax.ShapeDtypeStruct((size, size, 3), jnp.float32)
    graph, output = lower(function, variables, image)
    about = dict.fromkeys(SAID, "0")
    proto.write(onnx, path, graph, image, output, about)
    onnx.checker.check_model(path, full_check=True)
    return onnx.load(path)


def made(module, x):
    """What a module returns, as shapes, and random variables that do not amplify roundings as trained ones do not."""
    outputs, shapes = eval_shape_of_init(module.init_with_output, jax.random.key(0), x)
    rng = np.random.default_rng(0)

    def leaf(shape):
        if len(shape) < 2:
            return (1 + 0.3 * rng.random(shape)).astype(np.float32)
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    return outputs, jax.tree.map(lambda each: leaf(each.shape), dict(shapes))


OFTEN = {"convnext", "cswin", "maxxvit", "metaformer", "resnet"}  # `make long` has the others


@pytest.mark.parametrize("family", cases(FAMILIES, long=set(FAMILIES) - OFTEN))
def test_every_family_and_head(family, tmp_path, plain_convolutions):
    """One graph has a backbone and its heads; onnxruntime returns our logits for several batches."""
    models = {kind: small(family, kind) for kind in heads_on(family)}
    backbone = models["linear"].backbone
    size = backbone.image_size
    images = np.random.default_rng(0).standard_normal((BATCHES[-1], size, size, 3), np.float32)
    features, body = made(backbone, images)
    variables = {"body": body} | {kind: made(model.head, features)[1] for kind, model in models.items()}

    def run(variables, images):
        features = backbone.apply(variables["body"], images)
        outputs = (model.head.apply(variables[kind], features) for kind, model in models.items())
        return jnp.concatenate([average(each) for each in outputs], axis=1)

    wanted = np.asarray(quick(run, variables, images))
    model = written(tmp_path / "all.onnx", run, variables, size)
    network = Network(tmp_path / "all.onnx")
    heads = np.split(wanted, len(models), axis=1)
    assert all(head.std(0).max() > 1e-3 * head.std() for head in heads)  # the images make a difference
    for count in BATCHES:
        found = np.split(network.run(images[:count]), len(models), axis=1)
        for kind, mine, own in zip(models, found, heads, strict=True):
            assert np.abs(mine - own[:count]).max() < 2e-5 * own.std(), (kind, count)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Conv", "MatMul"} | ({"LayerNormalization"} if "map" in models else set()) <= kinds
    assert not kinds & {"Dropout", "If", "Loop"}  # what is there for training, or for XLA's CPU


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    """A checkpoint of a small MobileNet with two branches, raw weights."""
    given = {"name": "mobilenet_v1", **dict(BACKBONES["mobilenet"][1]), "num_classes": 3}
    model = create_model(**given)
    images = jnp.zeros((1, 16, 16, 3))
    _, variables = made(model, images)
    info = {"model": given, "classes": list(CLASSES), "preprocessing": preprocessing() | {"image_size": 16}}
    info["config"] = {"data": {"source": "folder", "path": "photos", "mask_folder": None, "reduce_zero_label": True}}
    folder = tmp_path_factory.mktemp("onnx") / "made"
    checkpoint.write_variables(folder, variables, info | {"step": 0, "weights": "raw"})
    return folder, info, lambda images: average(quick(model.apply, variables, images))


def test_a_file_says_what_it_is_and_takes_pixels(checkpoint_folder, tmp_path, capsys, quick_compilation):
    folder, info, wanted = checkpoint_folder
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    mean, std = (info["preprocessing"][key] for key in ("mean", "std"))
    images = np.asarray(normalize(pixels, mean, std))
    for name, inputs, options in (("normalised", images, []), ("pixels", pixels, ["--pixels"])):
        file = tmp_path / f"{name}.onnx"
        assert main(["export", str(folder), str(file), *options]) == 0
        model = onnx.load(file)
        assert f"{len(model.graph.node)} nodes, within" in capsys.readouterr().out
        np.testing.assert_allclose(Network(file).run(inputs), wanted(images), rtol=2e-5, atol=2e-5)
        about = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(about["classes"]) == list(CLASSES)
        assert json.loads(about["preprocessing"]) == info["preprocessing"]
        assert json.loads(about["model"])["name"] == "mobilenet_v1"
        labelling = {"source": "folder", "mask_folder": None, "reduce_zero_label": True}  # as the run read labels
        assert Network(file).info["config"] == {"data": labelling}
        assert about["input"].startswith("uint8 [B, 16, 16, 3]" if options else "float32 [B, 16, 16, 3]")
        # Norms are folded into the convolutions, whose activations are all that is left beside the head.
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("Conv") == 7 and "BatchNormalization" not in kinds and kinds.count("Mul") == len(options)


def test_a_file_that_computes_something_else_is_not_written(checkpoint_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(lowering.RULES, "max", lowering.RULES["min"])
    assert main(["export", str(checkpoint_folder[0]), str(tmp_path / "a.onnx")]) == 2
    assert "onnxruntime's logits differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_sentence(checkpoint_folder, tmp_path, capsys, monkeypatch):
    def says(*options):
        assert main(["export", str(checkpoint_folder[0]), str(tmp_path / "a.onnx"), *options]) == 2
        return capsys.readouterr().err

    assert "leave out --dialect" in says("--dialect=timm")
    assert "--platforms belongs to a program of JAX" in says("--platforms", "cpu")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "install the extra 'onnx'" in says()
    monkeypatch.delitem(sys.modules, "onnx")
    monkeypatch.setattr(export, "has_runtime", lambda: False)
    assert main(["export", str(checkpoint_folder[0]), str(tmp_path / "unseen.onnx")]) == 0
    assert "not run, as onnxruntime is not installed" in capsys.readouterr().out
    (tmp_path / "unseen.onnx").unlink()
    monkeypatch.delitem(lowering.RULES, "max")
    assert "has the operation 'max', which the export to ONNX does not know" in says()
    assert not list(tmp_path.iterdir())


def test_predict_and_validate_take_the_file(checkpoint_folder, tmp_path, capsys, quick_compilation):
    """Classes, figures and rows are those of the checkpoint, whether the file normalises or not."""
    folder, _, _ = checkpoint_folder
    photos = write_folder(tmp_path, train=0, val=9) / "val"
    images = sorted(map(str, photos.glob("*/*.png")))
    validate = ("validate", "{}", str(photos), f"--json={tmp_path}/result.json", f"--csv={tmp_path}/rows.csv", "--flip")
    told = {}
    for name, options in {"made": [], "normalised.onnx": [], "pixels.onnx": ["--pixels"]}.items():
        path = folder if name == "made" else tmp_path / name
        if name != "made":
            assert main(["export", str(folder), str(path), *options]) == 0
        capsys.readouterr()
        assert main(["predict", str(path), *images]) == 0
        named = re.sub(r"\.\d %", " %", capsys.readouterr().out)
        assert main([part.format(path) for part in validate]) == 0
        result = json.loads((tmp_path / "result.json").read_text())
        result["loss"] = pytest.approx(result["loss"], rel=1e-5)
        told[name] = named, result, (tmp_path / "rows.csv").read_text()
    assert told["made"] == told["normalised.onnx"] == told["pixels.onnx"]
    capsys.readouterr()
    assert "its weights are parts of a program: predict" in mistake(
        capsys, "embed", path, images[0], f"--to={path}.csv"
    )
    assert "takes images of its own size, 16 pixels" in mistake(capsys, "predict", path, images[0], "--image-size=32")
    given = (*(part.format(path) for part in validate), "--std", "1", "1", "1")
    assert "normalises by its own mean" in mistake(capsys, *given)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert "does not say its model, classes" in mistake(capsys, "predict", path, images[0])
    path.write_bytes(path.read_bytes()[:999])
    assert "onnxruntime cannot run" in mistake(capsys, "predict", path, images[0])
