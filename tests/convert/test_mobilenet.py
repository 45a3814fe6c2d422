"""MobileNetV1 as phones and browsers have it: small files of each format, and the released weights where they are."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real_weights import CASES, convert_case, logits_of
from maxmap import __main__ as commands
from maxmap.convert.load import read_foreign, read_model
from maxmap.convert.sources import read_source
from maxmap.convert.torch import to_torch
from maxmap.errors import UserError
from maxmap.models import average, create_model
from tests.convert.program_files import (
    CONV,
    DEPTHWISE,
    POOL,
    RESHAPE,
    SOFTMAX,
    TFLite,
    field,
    onnx_dequantise,
    onnx_tensor,
    write_onnx,
    write_tfjs,
)
from tests.convert.test_torch import assert_equal, random_variables
from tests.zoo import numbers, quick

ROOT = Path(__file__).parents[2]
NAME = "mobilenet_v1_025_tf"
WIDTHS = [8, 16, 32, 32, 64, 64, *[128] * 6, 256, 256]
STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
RELU6 = 3


def layers():
    """Kind, stride, input and output channels of each convolution, by the paper's table 1 with a quarter's width."""
    yield CONV, 2, 3, 8
    for stride, width, wider in zip(STRIDES, WIDTHS, WIDTHS[1:], strict=False):
        yield DEPTHWISE, stride, width, width
        yield CONV, 1, width, wider


def add(file, kind, stride, inputs, outputs, number, activation, rng):
    """Adds a convolution with integers for weights; returns the numbers that they stand for.

    Odd ones are as newer converters write them, in 8 bits with a sign and a scale for each channel. Even ones are as
    older ones do: one scale, and ReLU6 as the range of the result. The fifth has floats of 16 bits.
    """
    size = 3 if number == 0 or kind == DEPTHWISE else 1
    shape = (1, size, size, outputs) if kind == DEPTHWISE else (outputs, size, size, inputs)
    fan_in = size * size * (1 if kind == DEPTHWISE else inputs)
    axis = 3 if kind == DEPTHWISE else 0
    if number % 2:
        stored = rng.integers(-127, 128, shape).astype(np.int8)
        scales, zeros = rng.uniform(1, 2, outputs).astype(np.float32) / np.float32(60 * fan_in**0.5), [0] * outputs
        fused = {"relu6": RELU6, "relu": 1}.get(activation, 0)
    else:
        stored = rng.integers(0, 256, shape).astype(np.uint8)
        scales, zeros = np.float32([1 / (40 * fan_in**0.5)]), [121]
        fused = 0
    if number == 4:
        stored, scales, zeros = (stored / np.float32(40 * 8 * fan_in**0.5)).astype(np.float16), np.float32([1]), [0]
        weight = file.widen(file.tensor(shape, "float16", stored), shape)
    else:
        weight = file.tensor(shape, str(stored.dtype), stored, scales, zeros, axis)
    whole = rng.integers(-500, 1500, outputs).astype(np.int32)
    bias = file.tensor((outputs,), "int32", whole, [1e-3], [0])
    highest = {"relu": 12}.get(activation, 6)
    result = file.tensor((1, 1, 1, outputs), "uint8", None, [highest / 255], [0])
    options = [("b", 0), ("i", stride), ("i", stride), *([("i", 1)] * (kind == DEPTHWISE)), ("b", fused)]
    file.operator(kind, [weight, bias], result, *options, ("i", 1), ("i", 1))
    aligned = [-1 if i == axis and len(scales) > 1 else 1 for i in range(4)]
    real = (stored.astype(np.float64) - zeros[0]) * scales.astype(np.float64).reshape(aligned)
    return real.transpose(3, 0, 1, 2) if kind == DEPTHWISE else real.transpose(0, 3, 1, 2), 1e-3 * whole


def write_mobilenet(trunk, classifier=None, *, classes=11, size=72, change=lambda number, layer: layer):
    """Writes the network to one file or two; returns weight, bias, stride and groups of its convolutions."""
    rng = np.random.default_rng(0)
    file, found = TFLite((1, size, size, 3)), []
    for number, layer in enumerate(layers()):
        kind, stride, inputs, outputs, activation = change(number, (*layer, "relu6"))
        weight, bias = add(file, kind, stride, inputs, outputs, number, activation, rng)
        found.append((weight, bias, stride, outputs if kind == DEPTHWISE else 1))
    pooled = file.tensor((1, 1, 1, 256), "uint8", None, [6 / 255], [0])
    file.operator(POOL, [], pooled)
    if classifier is not None:
        file.write(trunk)
        file = TFLite((1, 1, 1, 256))
    weight, bias = add(file, CONV, 1, 256, classes, 1, "none", rng)
    found.append((weight, bias, 1, 1))
    file.operator(RESHAPE, [], file.tensor((1, classes), "uint8"))
    file.operator(SOFTMAX, [], file.tensor((1, classes), "uint8"))
    file.write(trunk if classifier is None else classifier)
    return found


def by_torch(convolutions, images):
    """The logits of images [B, H, W, 3] with TensorFlow's padding, ReLU6 and biases in place of norms."""
    import torch
    from torch.nn import functional

    x = torch.from_numpy(images.transpose(0, 3, 1, 2))
    for number, (weight, bias, stride, groups) in enumerate(convolutions):
        last, size = number == len(convolutions) - 1, weight.shape[-1]
        x = x.mean((2, 3), keepdim=True) if last else x
        pads = []
        for side in (x.shape[3], x.shape[2]):
            missing = max(0, (-(-side // stride) - 1) * stride + size - side)
            pads += [missing // 2, missing - missing // 2]
        weight, bias = torch.from_numpy(np.ascontiguousarray(weight)), torch.from_numpy(bias)
        x = functional.conv2d(functional.pad(x, pads), weight, bias, stride, groups=groups)
        x = x if last else functional.relu6(x)
    return x[:, :, 0, 0].numpy()


def test_tflite_computes_what_its_program_says(x64, plain_convolutions, tmp_path, capsys):
    """From one file and from two, whose 1,001 classes begin with none of ImageNet's, to the logits of images."""
    convolutions = write_mobilenet(tmp_path / "whole.tflite", classes=1001)
    write_mobilenet(tmp_path / "trunk.tflite", tmp_path / "classifier.tflite", classes=1001)
    assert commands.main(["convert", str(tmp_path / "whole.tflite"), str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    assert f"{NAME}, 470,072 parameters, 1000 classes, from tflite" in printed
    assert "\ndequantised 55 entries by their scales: 13 of uint8, 28 of int32, 14 of int8\n" in printed
    assert "left out the first of 1,001 classes, background" in printed and "made 27 batch norms" in printed
    assert "image_size 72, crop_pct 0.875, crop_mode center, interpolation bilinear, mean 0.5 0.5 0.5" in printed
    two = ["--classifier", str(tmp_path / "classifier.tflite")]
    assert commands.main(["convert", str(tmp_path / "trunk.tflite"), str(tmp_path / "two"), *two]) == 0
    assert commands.main(["verify", str(tmp_path / "two"), "--against", str(tmp_path / "trunk.tflite"), *two]) == 0
    variables, info = read_model(tmp_path / "whole")
    assert_equal(read_model(tmp_path / "two")[0], variables)
    model, images = create_model(**info["model"]), numbers(0, 2, 72, 72, 3)
    ours = quick(lambda v, x: average(model.apply(v, x)), variables, images)
    wanted = by_torch(convolutions, images)[:, 1:]
    assert wanted.std() > 0.1
    assert np.abs(ours - wanted).max() < 1e-6 * wanted.std()  # the converted values are float32


def test_a_trunk_alone_gives_embeddings(tmp_path):
    write_mobilenet(tmp_path / "trunk.tflite", tmp_path / "classifier.tflite")
    converted = read_foreign(tmp_path / "trunk.tflite")
    assert converted.model.head.num_classes == 0 and len(converted.report.loaded) == 135
    with pytest.raises(UserError, match="has 2 entries that the source has too"):
        read_source(tmp_path / "classifier.tflite", classifier=tmp_path / "classifier.tflite")


def change_layer(number, **changes):
    """Changes a convolution of `write_mobilenet`."""
    names = ("kind", "stride", "inputs", "outputs", "activation")
    return lambda i, layer: (
        layer if i != number else tuple({**dict(zip(names, layer, strict=True)), **changes}.values())
    )


@pytest.mark.parametrize(
    "change, sentence",
    [
        (change_layer(5, kind=CONV), "its convolution 6 is a 1x1 convolution of stride 1, not a depthwise 3x3"),
        (change_layer(3, stride=1), "its convolution 4 is a depthwise 3x3 convolution of stride 1, not .* of stride 2"),
        (change_layer(7, activation="relu"), "its operation 9 has the activation 1, not ReLU6"),
        (change_layer(8, activation="relu"), "its operation 10 has the activation 0, not ReLU6"),
        (change_layer(4, kind=18), "its operation 6 is MUL, which does not belong there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_network_is_refused(change, sentence, tmp_path, capsys):
    path = tmp_path / "other.tflite"
    write_mobilenet(path, change=change)
    error = refused(path, tmp_path, capsys)
    assert re.search(f"other.tflite is no MobileNetV1, {sentence}", error)


def refused(path, tmp_path, capsys, *options):
    """Converts a bad file: one sentence, exit code 2, and nothing is written."""
    assert commands.main(["convert", str(path), str(tmp_path / "dest"), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("maxmap: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "dest").exists()
    return captured.err


def test_damaged_tflite_is_one_sentence(tmp_path):
    """Cut off anywhere, or with a byte changed in the tables that it begins with: read or refused, never broken."""
    path, bad = tmp_path / "whole.tflite", tmp_path / "bad.tflite"
    write_mobilenet(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for number in range(120):
        data, cut = bytearray(whole), number % 3 == 0
        if cut:
            del data[rng.integers(8, len(whole)) :]
        else:
            data[rng.integers(8, 4000)] = rng.integers(256)
        bad.write_bytes(data)
        try:
            read_source(bad)
            assert not cut
        except UserError as error:
            assert str(error).endswith(".") and "\n" not in str(error)


@pytest.fixture(scope="module")
def state_dict():
    """A state dict of the model, and its variables."""
    model = create_model(NAME, num_classes=3)
    variables = random_variables(model)
    return {key: np.ascontiguousarray(value) for key, value in to_torch(variables, model).items()}, variables


def keras_weights(state_dict):
    """The variables of Keras's MobileNet, by its names and in its layout."""
    modules = ["layers.0.0", *(f"layers.{s}.{u + (not s)}" for s, d in enumerate((1, 2, 2, 6, 2)) for u in range(d))]
    found = {}
    for number, module in enumerate(modules):
        for index, kind in ((0, "dw"), (3, "pw")) if number else ((0, ""),):
            name = f"conv_{kind}_{number}" if number else "conv1"
            kernel = state_dict[f"{module}.{index}.weight"].transpose(2, 3, 1, 0)
            kernel = kernel.transpose(0, 1, 3, 2) if kind == "dw" else kernel
            found[f"{name}/{'depthwise_' * (kind == 'dw')}kernel"] = kernel
            leaves = {
                "gamma": "weight",
                "beta": "bias",
                "moving_mean": "running_mean",
                "moving_variance": "running_var",
            }
            for theirs, ours in leaves.items():
                found[f"{name}_bn/{theirs}"] = state_dict[f"{module}.{index + 1}.{ours}"]
    found["conv_preds/kernel"] = state_dict["fc.2.weight"].T[None, None]
    found["conv_preds/bias"] = state_dict["fc.2.bias"]
    return found


def test_tensorflow_js(state_dict, tmp_path, capsys):
    arrays, variables = state_dict
    folder = tmp_path / "tfjs"
    weights = keras_weights(arrays)
    write_tfjs(folder, weights, 160)
    for source in (folder, folder / "model.json"):
        converted = read_foreign(source)
        assert converted.info["model"] == {"name": NAME, "num_classes": 3, "image_size": 160}
        assert converted.report.notes == ["dequantised 1 entries by their scales: 1 of uint8"]
        stem = converted.variables["params"]["backbone"]["layers_0_0_0"]
        step = np.ptp(weights["conv1/kernel"]) / 255
        assert np.abs(stem["kernel"] - weights["conv1/kernel"]).max() < 0.51 * step
        stem["kernel"] = variables["params"]["backbone"]["layers_0_0_0"]["kernel"]
        assert_equal(converted.variables, variables)
    shard = folder / "group1-shard2of2"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "end within" in refused(folder, tmp_path, capsys)
    shard.write_bytes(shard.read_bytes() + bytes(5))
    assert "4 bytes more than it lists" in refused(folder, tmp_path, capsys)
    shard.unlink()
    assert "no file group1-shard2of2 beside" in refused(folder, tmp_path, capsys)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"paths": ["../x"]}, r"names the file \.\./x, which is not beside it"),
        ({"paths": ["group1-shard1of2"] * 2}, "names the file group1-shard1of2 twice"),
        ({"paths": 1}, "lists weights without 'paths'"),
        ({"weights": [{"name": "a", "shape": [1 << 40, 8], "dtype": "float32"}]}, "end within a"),
        ({"weights": [{"name": "a", "shape": [-1], "dtype": "float32"}]}, "without a name or a shape"),
        ({"weights": [{"name": "a", "shape": [0, 1 << 61], "dtype": "float32"}]}, "without a name or a shape"),
        (
            {"weights": [{"name": "a", "shape": [1], "dtype": "uint8", "quantization": {"scale": 10**400, "min": 0}}]},
            "'scale'",
        ),
        ({"weights": [{"name": "a", "shape": [1], "dtype": "string"}]}, "a with the type string"),
        ({"weights": [{"name": "a", "shape": [1], "dtype": "uint8", "quantization": {"dtype": "uint8"}}]}, "'scale'"),
    ],
)
def test_a_bad_model_json_is_one_sentence(change, sentence, tmp_path, capsys):
    folder = tmp_path / "tfjs"
    write_tfjs(folder, {"a": np.float32([1, 2]), "b": np.ones(1000, np.float32)}, 32)
    content = json.loads((folder / "model.json").read_text())
    content["weightsManifest"][0] |= change
    (folder / "model.json").write_text(json.dumps(content))
    assert re.search(sentence, refused(folder, tmp_path, capsys))


def onnx_graph(arrays, folder):
    """A graph with the entries of a state dict in every way in which ONNX keeps numbers; the integers fit exactly."""
    graph, beside = [], b""
    for number, (name, values) in enumerate(arrays.items()):
        if number == 0:
            graph.append(onnx_tensor(name, values.shape, 1, field(4, values.tobytes())))
        elif number == 1:
            place = {"location": "weights.bin", "offset": str(len(beside)), "length": str(values.nbytes)}
            entries = [field(13, field(1, key) + field(2, value)) for key, value in place.items()]
            graph.append(onnx_tensor(name, values.shape, 1, *entries, field(14, 1)))
            beside += values.tobytes()
        elif number == 2:
            stored, zero = np.round(values * 64).astype(np.int8) + np.int8(3), np.full(len(values), 3, np.int8)
            graph += [
                onnx_tensor(f"{name}_quantized", values.shape, 3, field(9, stored.tobytes())),
                onnx_tensor("scale", zero.shape, 1, field(9, np.full(len(values), 1 / 64, np.float32).tobytes())),
                onnx_tensor("zero", zero.shape, 3, field(9, zero.tobytes())),
                onnx_dequantise(f"{name}_quantized", "scale", "zero", 0),
            ]
        else:
            graph.append(onnx_tensor(name, values.shape, 1, field(9, values.tobytes())))
    graph.append(onnx_tensor("shape", (2,), 7, field(7, bytes([1, 5]))))  # of the program, no weight
    graph.append(onnx_tensor("six", (), 1, field(9, np.float32(6).tobytes())))
    (folder / "weights.bin").write_bytes(beside)
    return graph


def test_onnx(state_dict, tmp_path, capsys):
    arrays, path = state_dict[0], tmp_path / "model.onnx"
    key = list(arrays)[2]
    arrays = arrays | {key: np.round(arrays[key] * 16).clip(-64, 64) / np.float32(16)}
    write_onnx(path, *onnx_graph(arrays, tmp_path))
    source = read_source(path)
    assert source.kind == "onnx" and set(source.tensors) == set(arrays)
    assert all(np.array_equal(source.tensors[name], values) for name, values in arrays.items())
    assert source.notes == ("dequantised 1 entries by their scales: 1 of int8",)
    assert len(read_foreign(path, name=NAME).report.loaded) == 137
    whole = path.read_bytes()
    for end in (3, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "model.onnx is cut off or no ONNX file" in refused(path, tmp_path, capsys, "--model", NAME)
    path.write_bytes(whole)
    (tmp_path / "weights.bin").unlink()
    assert "no file weights.bin beside" in refused(path, tmp_path, capsys, "--model", NAME)


@pytest.mark.parametrize(
    "tensor, sentence",
    [
        (onnx_tensor("a", (2**20, 2**30), 1, field(9, bytes(8))), "a has 8 bytes, its shape needs"),
        (onnx_tensor("a", (2**63,), 1, field(9, bytes(8))), "a has the shape"),
        (onnx_tensor("a", (0, 2**61), 1, field(9, b"")), "a has the shape"),
        (onnx_tensor("a", (1,) * 65, 1, field(9, bytes(4))), "a has the shape"),
        (onnx_tensor("a", (1,), 1, field(13, field(1, "location") + field(2, "../x")), field(14, 1)), "not beside it"),
        (onnx_tensor("a", (1,), 1, field(9, bytes(4))) * 2, "the entry a twice"),
        (field(5, 7), "integer where bytes"),
        (b"", "holds no weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_onnx_is_one_sentence(tensor, sentence, tmp_path, capsys):
    write_onnx(tmp_path / "model.onnx", tensor)
    assert sentence in refused(tmp_path / "model.onnx", tmp_path, capsys, "--model", NAME)


def test_norms_that_stand_for_folded_ones_follow_the_epsilon(state_dict, tmp_path):
    """Written for 1e-5, they change nothing under TensorFlow's 1e-3; a norm that was learned stays."""
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = dict(state_dict[0])
    norm = "layers.0.0.1."
    for leaf, value in {"weight": 1, "running_mean": 0, "running_var": 1 - 1e-5}.items():
        arrays[f"{norm}{leaf}"] = np.full(8, value, np.float32)
    safetensors.save_file(arrays, tmp_path / "model.safetensors")
    converted = read_foreign(tmp_path / "model.safetensors", name=NAME)
    assert list(converted.report.changed) == [f"{norm}running_var"]
    backbone = converted.variables["batch_stats"]["backbone"]
    assert np.allclose(backbone["layers_0_0_1"]["var"] + 1e-3, 1, rtol=0, atol=1e-7)
    assert np.array_equal(backbone["layers_0_1_1"]["var"], arrays["layers.0.1.1.running_var"])


@pytest.fixture(scope="module")
def released():
    """The folder of released weights, which does not ship with the repository: elsewhere the test is skipped."""
    folder = ROOT.parent / "shared" / "data" / "mobilenet_v1"
    if not folder.is_dir():
        pytest.skip("needs shared/data/mobilenet_v1 beside the repository")
    return folder


def test_every_released_file_converts(released, tmp_path):
    for number, case in enumerate(CASES):
        convert_case(case, released, tmp_path / str(number))
        info = read_model(tmp_path / str(number))[1]
        pixels = re.search(r"_(128|160|192)_", case.source)
        assert info["model"].get("image_size", 224) == info["preprocessing"]["image_size"]
        assert info["preprocessing"]["image_size"] == (int(pixels[1]) if pixels else 224)
        assert len(info["classes"]) == 1000 and info["preprocessing"]["interpolation"] == "bilinear"
        assert info["preprocessing"]["mean"][0] == (0.485 if case.source.endswith(".tar") else 0.5)


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=lambda case: case.source)
def test_released_weights_give_the_logits_of_the_reference(case, released, tmp_path):
    """The first 64 photographs; `python -m benchmarks.real_weights` has all of them and all files."""
    with tarfile.open(released.parent / "imagenet_sample.tar") as archive:
        photographs = sorted(member.name for member in archive if member.isfile())[:64]
        archive.extractall(tmp_path, [archive.getmember(name) for name in photographs], filter="data")
    convert_case(case, released, tmp_path / "checkpoint")
    logits = logits_of(tmp_path / "checkpoint", [tmp_path / name for name in photographs], batch_size=64)
    with np.load(released / "reference_logits.npz") as reference:
        wanted = reference[case.reference]
    assert np.abs(logits - wanted).max() < 1e-4 * wanted.std()
    assert np.array_equal(logits.argmax(1), wanted.argmax(1))
