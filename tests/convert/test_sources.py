"""Files of all kinds in, with everything that surrounds a state dict; what is damaged or dangerous is one sentence."""

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from maxmap import __main__ as commands
from maxmap.convert.hub import published_preprocessing
from maxmap.convert.load import convert, export, read_foreign, read_model
from maxmap.convert.sources import read_source
from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests.convert.test_torch import assert_equal, random_variables

torch = pytest.importorskip("torch")

MODEL = {"name": "test_maxvit", "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    return create_model(**MODEL)


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


@pytest.fixture(scope="module")
def arrays(model, variables):
    return {key: np.ascontiguousarray(value) for key, value in to_torch(variables, model).items()}


def tensors(arrays):
    return {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}


def equal(source, arrays):
    assert set(source.tensors) == set(arrays)
    return all(np.array_equal(np.asarray(source.tensors[key]), value) for key, value in arrays.items())


def refused(path, tmp_path, capsys, *options):
    """Converts a bad file: one sentence, and nothing is written."""
    dest = tmp_path / "dest"
    before = sorted(tmp_path.iterdir())
    assert commands.main(["convert", str(path), str(dest), "--model", "test_maxvit", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("maxmap: ") and captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    return captured.err


def test_safetensors(arrays, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    source = read_source(path)
    assert equal(source, arrays) and source.kind == "safetensors"
    assert all(not value.flags.owndata for value in source.tensors.values())  # they lie in the mapped file


def test_half_precision_without_torch(arrays, tmp_path):
    """bfloat16 and float16 keep their values, exactly widened."""
    from safetensors.torch import save_file as save

    for dtype in (torch.bfloat16, torch.float16):
        path = tmp_path / "half.safetensors"
        save({key: value.to(dtype) for key, value in tensors(arrays).items()}, path)
        source = read_source(path)
        assert {value.dtype for value in source.tensors.values()} <= {
            np.dtype(np.float16),
            np.dtype(ml_dtypes.bfloat16),
        }
        for key, value in tensors(arrays).items():
            assert np.array_equal(source.tensors[key].astype(np.float32), value.to(dtype).float().numpy())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", [None, "state_dict", "model", "params"])
def test_containers(container, legacy, arrays, tmp_path):
    content = tensors(arrays)
    if container:
        content = {
            "epoch": 3,
            "args": argparse.Namespace(lr=1e-3, opt="adamw", metric=np.float64(81.2)),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
            "best": np.float32(0.5),
            container: collections.OrderedDict(content),
        }
    path = tmp_path / "model.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    source = read_source(path)
    assert equal(source, arrays) and (source.kind, source.weights) == ("torch", "raw")


@pytest.mark.parametrize("container", ["state_dict_ema", "model_ema"])
def test_averaged_weights_are_picked(container, arrays, tmp_path):
    doubled = {key: 2 * value for key, value in arrays.items()}
    path = tmp_path / "model.pth"
    torch.save({"model": tensors(arrays), container: {"module": tensors(doubled)}}, path)
    assert equal(read_source(path), arrays) and equal(read_source(path, ema=False), arrays)
    source = read_source(path, ema=True)
    assert equal(source, doubled) and source.weights == "ema"
    torch.save({container: tensors(doubled)}, path)
    assert read_source(path).weights == "ema"
    torch.save({"state_dict": tensors(arrays)}, path)
    with pytest.raises(UserError, match="no averaged weights: leave --ema out"):
        read_source(path, ema=True)


def shards(folder, arrays, kind="safetensors"):
    names = sorted(arrays)
    parts = {f"model-0000{i + 1}-of-00002.{kind}": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save_file({key: arrays[key] for key in keys}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in parts.items() for key in keys}}))
    return index


def test_shards(arrays, tmp_path):
    index = shards(tmp_path, arrays)
    assert equal(read_source(index), arrays) and equal(read_source(tmp_path), arrays)
    content = json.loads(index.read_text())
    key = sorted(arrays)[0]
    for changed, why in (
        ({key: "../elsewhere.safetensors"}, "which is not beside it"),
        ({"more": "model-00001-of-00002.safetensors"}, "do not agree on 1 entries"),
        (dict.fromkeys(arrays, "model-00003-of-00002.safetensors"), "there is no checkpoint"),
    ):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | changed}))
        with pytest.raises(UserError, match=why):
            read_source(index)


def test_a_repository_says_its_model_classes_and_preprocessing(arrays, variables, tmp_path):
    config = {
        "architecture": "test_maxvit",
        "num_classes": 3,
        "label_names": ["cat", "dog", "emu"],
        "pretrained_cfg": {
            "input_size": [3, 192, 192],
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "crop_pct": 0.9,
            "crop_mode": "squash",
            "interpolation": "bilinear",
        },
    }
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(config))
    save_file(arrays, snapshot / "model.safetensors")
    (tmp_path / "models--me--mine" / "refs").mkdir()
    (tmp_path / "models--me--mine" / "refs" / "main").write_text("abc")
    for source in (snapshot, tmp_path / "models--me--mine"):
        dest = tmp_path / f"dest-{source.name}"
        loaded = convert(source, dest)
        assert loaded.report.changed  # tables, from 160 to 192 pixels
        back, info = read_model(dest)
        assert info["model"] == {"name": "test_maxvit", "image_size": 192, "num_classes": 3}
        assert info["classes"] == ["cat", "dog", "emu"]
        assert info["preprocessing"] == {
            "image_size": 192,
            "crop_pct": 0.9,
            "crop_mode": "squash",
            "interpolation": "bilinear",
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
        }
        assert np.array_equal(
            back["params"]["backbone"]["stem"]["conv1"]["kernel"],
            variables["params"]["backbone"]["stem"]["conv1"]["kernel"],
        )


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_there_and_back(name, arrays, variables, model, tmp_path, capsys):
    """What convert writes is read by everything that reads checkpoints; export gives the same bits back."""
    save_file(arrays, tmp_path / "in.safetensors")
    dest = tmp_path / "dest"
    assert commands.main(["convert", str(tmp_path / "in.safetensors"), str(dest), "--model", "test_maxvit"]) == 0
    assert "loaded 176 entries as they were" in capsys.readouterr().out.replace(str(len(arrays)), "176")
    back, info = read_model(dest)
    assert_equal(back, variables)
    assert info["model"] == MODEL and info["weights"] == "raw" and info["step"] == 0
    assert commands.main(["export", str(dest), str(tmp_path / name)]) == 0
    assert equal(read_source(tmp_path / name), arrays)
    assert_equal(from_torch(read_source(tmp_path / name).tensors, model), variables)
    for command in (
        ["convert", str(tmp_path / "in.safetensors"), str(dest), "--model", "test_maxvit"],
        ["export", str(dest), str(tmp_path / name)],
    ):
        assert commands.main(command) == 2 and "is there already" in capsys.readouterr().err
        assert commands.main([*command, "--overwrite"]) == 0
    with pytest.raises(UserError, match="has no known ending"):
        export(dest, tmp_path / "out.onnx")


def test_a_preprocessing_that_the_source_does_not_say(arrays, tmp_path, capsys):
    """What is assumed is named; what the user says is not, and replaces what a source says."""
    (tmp_path / "hub").mkdir()
    save_file(arrays, file := tmp_path / "hub/model.safetensors")
    command = ["convert", str(file), str(tmp_path / "dest"), "--model=test_maxvit"]
    assert commands.main([*command, "--crop-pct=0.9", "--mean", "0.5", "0.5", "0.5"]) == 0
    assert (
        "\nassumed, as the source does not say it: crop_mode center, interpolation bicubic, std 0.229 0.224 0.225, "
        "as most networks for ImageNet have it; "
    ) in capsys.readouterr().out
    pre = read_model(tmp_path / "dest")[1]["preprocessing"]
    assert (pre["crop_pct"], pre["mean"], pre["image_size"]) == (0.9, [0.5, 0.5, 0.5], 160)
    said = {"input_size": [3, 160, 160], "mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.95}
    (tmp_path / "hub/config.json").write_text(json.dumps({"architecture": "test_maxvit", "pretrained_cfg": said}))
    loaded = read_foreign(tmp_path / "hub", preprocessing={"mean": (0.5, 0.5, 0.5)})
    assert loaded.info["preprocessing"]["mean"] == [0.5] * 3 and loaded.info["preprocessing"]["std"] == [0.2] * 3
    assert not loaded.assumed


def test_the_preprocessing_of_a_published_checkpoint_of_the_same_model_is_assumed():
    pre, whose = published_preprocessing("maxvit_tiny_tf_384", 1000, 384)
    assert (
        whose == "timm/maxvit_tiny_tf_384.in1k has it"
        and pre["crop_mode"] == "squash"
        and pre["mean"] == [0.5, 0.5, 0.5]
    )
    assert published_preprocessing("maxvit_tiny_tf_384", 1000, 416)[0] == {**pre, "image_size": 416}


def test_a_folder_of_other_things_is_never_replaced(arrays, tmp_path):
    save_file(arrays, tmp_path / "in.safetensors")
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds something other than a checkpoint"):
        convert(tmp_path / "in.safetensors", tmp_path / "dest", name="test_maxvit", overwrite=True)
    assert (tmp_path / "dest" / "thesis.tex").read_text() == "mine"


class Runs:
    """A pickle that runs a command as it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_pickle_is_run(arrays, tmp_path, capsys):
    bomb, path = tmp_path / "ran", tmp_path / "evil.pth"
    for save in (
        lambda content: torch.save(content, path),
        lambda content: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content: path.write_bytes(pickle.dumps(content)),
    ):
        save({"state_dict": tensors(arrays), "args": Runs(bomb)})
        message = refused(path, tmp_path, capsys)
        assert ("is refused: it would run or build" in message and "system" in message) or "no file of" in message
        assert not bomb.exists()


class Wrapper(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for i, value in enumerate(tensors.values()):
            self.register_buffer(f"part{i}", value)


def test_a_refused_pickle_says_how_its_owner_saves_the_weights(arrays, tmp_path, monkeypatch):
    """A whole module, a date beside the weights or among them: the line in the message is run as it stands."""
    monkeypatch.chdir(tmp_path)
    now, weights = datetime.datetime(2024, 1, 1), tensors(arrays)
    for content in (
        Wrapper(weights),
        {"model": Wrapper(weights), "epoch": 3},
        {"state_dict": weights, "date": now},
        {"model": weights | {"date": now}},
        weights | {"date": now},
    ):
        torch.save(content, "it's.pth")
        with pytest.raises(UserError, match=r"let its owner save the weights alone, import torch; ") as error:
            read_source("it's.pth")
        assert len(str(error.value)) < 700
        exec(str(error.value).partition("weights alone, ")[2].rstrip("."), {})
        saved = read_source("weights.pth").tensors
        assert [value.tolist() for value in saved.values()] == [value.tolist() for value in arrays.values()]


def test_a_wrapped_model_is_converted_with_what_is_beside_left_out(arrays, variables, tmp_path, capsys):
    wrapped = {f"timm_model.{key}": value for key, value in arrays.items()} | {
        "criterion.weight": np.ones(3, np.float32)
    }
    save_file(wrapped, tmp_path / "in.safetensors")
    assert "--ignore 'criterion.*'." in refused(tmp_path / "in.safetensors", tmp_path, capsys)
    command = ["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "dest"), "--model", "test_maxvit"]
    assert commands.main([*command, "--ignore", "criterion.*"]) == 0
    printed = capsys.readouterr().out
    assert "took the prefix timm_model. off the names" in printed
    assert "left out on request 1: criterion.weight" in printed
    assert_equal(read_model(tmp_path / "dest")[0], variables)


def test_damaged_and_swollen_files(arrays, tmp_path, capsys):
    path = tmp_path / "file.pth"
    torch.save(tensors(arrays), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in refused(path, tmp_path, capsys)
    path.write_bytes(b"")
    assert "is no checkpoint" in refused(path, tmp_path, capsys)
    path.write_bytes(b"<html>not found</html>")
    assert "is no checkpoint" in refused(path, tmp_path, capsys)
    # A zip bomb: the same archive, compressed, with a part that unpacks to 100 MB.
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("archive/data/999", bytes(100_000_000))
    assert "is refused: it is compressed" in refused(path, tmp_path, capsys)
    torch.save([1, 2, 3], path)
    assert "holds no state dict but list" in refused(path, tmp_path, capsys)


def test_damaged_safetensors(arrays, tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    save_file(arrays, path)
    whole = path.read_bytes()

    def header(content, data=b""):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return refused(path, tmp_path, capsys)

    path.write_bytes(whole[:-5])
    assert "is cut off" in refused(path, tmp_path, capsys)
    path.write_bytes(whole + b"more")
    assert "4 bytes that belong to no entry" in refused(path, tmp_path, capsys)
    path.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    assert "its header would end at byte" in refused(path, tmp_path, capsys)
    path.write_bytes(whole[:4])
    assert "it has 4 bytes" in refused(path, tmp_path, capsys)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    assert "the entry a twice" in header(f'{{"a": {json.dumps(entry)}, "a": {json.dumps(entry)}}}'.encode(), bytes(4))
    assert "does not follow" in header({"a": entry, "b": entry}, bytes(4))
    assert "of another size than its shape" in header({"a": entry | {"shape": [1 << 40, 1 << 40]}}, bytes(4))
    assert "header cannot be read" in header({"a": {"dtype": "PICKLE"}})
    assert "header cannot be read" in header(b"[1]")
    assert "holds no state dict" in header({})


def test_a_safetensors_header_states_what_it_likes(tmp_path, capsys):
    """Each lie is one short sentence, at once, and nothing is allocated for it."""
    path = tmp_path / "file.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    huge = int("9" * 4000)
    cases = [
        *(
            {"a": entry | {"data_offsets": offsets}}
            for offsets in ([], [0], [0, 4, 8], 4, None, "04", [0, None], [0.0, 4])
        ),
        *({"a": entry | {"data_offsets": offsets}} for offsets in ([0, huge], [-4, 0], [True, 4], {"0": 4})),
        *(
            {"a": entry | {"shape": shape}}
            for shape in ([1] * 65, [huge], [-1], ["1"], [None], 1, None, {}, [[1]], [1.0])
        ),
        *({"a": entry | {"dtype": dtype}} for dtype in (["F32"], None, 4, "f32", "F" * 100_000)),
        *({"a": value} for value in (None, 1, [], "text", {})),
        {"a" * 1_000_000: None},
        {"a\x1b[2J\n": None},
    ]
    texts = [json.dumps(case).encode() for case in cases]
    texts += [
        b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b"",
    ]
    for text in texts:
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        message = refused(path, tmp_path, capsys)
        assert "is damaged or no safetensors file" in message and len(message) < 600 and message[:-1].isprintable(), (
            message
        )


CONFIGS = [
    ({"pretrained_cfg": [1]}, "'pretrained_cfg'"),
    ({"pretrained_cfg": None, "input_size": None}, "'input_size'"),
    ({"input_size": 160}, "'input_size'"),
    ({"input_size": []}, "'input_size'"),
    ({"input_size": [3, 160, 10**12]}, "'input_size'"),
    ({"input_size": [3, 160, -1]}, "'input_size'"),
    ({"input_size": [3, "a", "b"]}, "'input_size'"),
    ({"mean": "0.5"}, "'mean'"),
    ({"mean": [0.5, None, 0.5]}, "'mean'"),
    ({"mean": [0.5, float("nan"), 0.5]}, "'mean'"),
    ({"std": [0.5, 0.0, 0.5]}, "'std'"),
    ({"std": []}, "'std'"),
    ({"crop_pct": "much"}, "'crop_pct'"),
    ({"crop_pct": -1}, "'crop_pct'"),
    ({"crop_pct": 1e-6}, "'crop_pct'"),
    ({"crop_mode": "diagonal"}, "'crop_mode'"),
    ({"interpolation": ["bicubic"]}, "'interpolation'"),
    ({"architecture": ["test_maxvit"]}, "'architecture'"),
    ({"architecture": "x" * 10_000}, "of the model xxxx"),
    ({"architecture": None, "model": "test_maxvit"}, "does not say which model"),
    ({"architecture": None, "model": {"name": 5}}, "'model'"),
]


@pytest.mark.parametrize("changed, why", CONFIGS)
def test_config_values_of_other_types(changed, why, arrays, tmp_path):
    """The entry of the config that cannot be is named."""
    usual = {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_maxvit"} | usual | changed))
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=why) as error:
        read_foreign(tmp_path)
    assert len(str(error.value)) < 700


def test_class_names_of_other_kinds_are_left_out(arrays, tmp_path):
    save_file(arrays, tmp_path / "model.safetensors")
    for names in ("abc", [1, 2, 3], ["a", "b", "b"], {"0": "a"}, ["a", "b"]):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_maxvit", "label_names": names}))
        assert read_foreign(tmp_path).info["classes"] == ["0", "1", "2"]


def test_an_index_that_names_itself_or_a_folder(arrays, tmp_path):
    index = shards(tmp_path, arrays)
    (tmp_path / "folder").mkdir()
    for file in (index.name, "other.index.json", "", ".", "..", "folder/file", "a\0b", "folder"):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        for source in (index, tmp_path):
            with pytest.raises(UserError, match=r"names the shard|there is no checkpoint .*folder"):
                read_source(source)
    for text in (
        "[" * 10_000,
        '{"a":' * 10_000,
        "9" * 5000,
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        "\xff",
    ):
        index.write_text(text, "latin-1")
        with pytest.raises(UserError, match=r"is no JSON file|holds no JSON object|is no index of shards"):
            read_source(index)


@pytest.mark.parametrize("version", ["def", "../elsewhere", "", "..", ".", "a\0b", "\xff\xfe", "x" * 5000])
def test_a_cache_entry_without_its_version(version, arrays, tmp_path):
    entry = tmp_path / "models--me--mine"
    (entry / "snapshots" / "abc").mkdir(parents=True)
    save_file(arrays, entry / "snapshots" / "abc" / "model.safetensors")
    (entry / "elsewhere").mkdir()
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(version, "latin-1")
    with pytest.raises(
        UserError, match=r"names the version .* has no such folder: download it again, or give a folder"
    ):
        read_source(entry)


def test_paths_that_cannot_be(tmp_path):
    for path in ("x" * 5000, "a\0b", tmp_path / ("y" * 300)):
        with pytest.raises(UserError, match=r"there is no checkpoint|cannot be read"):
            read_model(path)
        with pytest.raises(UserError, match=r"there is no checkpoint|cannot be read"):
            read_foreign(path, name="test_maxvit")


def test_values_that_are_no_weights(arrays, tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    for value, why in ((np.nan, "not finite"), (np.inf, "not finite"), (-np.inf, "not finite")):
        changed = arrays | {"stem.conv1.weight": arrays["stem.conv1.weight"].copy()}
        changed["stem.conv1.weight"][0, 0, 0, 0] = value
        save_file(changed, path)
        assert f"{why}: stem.conv1.weight" in refused(path, tmp_path, capsys)
    save_file(arrays | {"stem.conv1.weight": arrays["stem.conv1.weight"].astype(np.int32)}, path)
    assert "no floating-point numbers: stem.conv1.weight is of type int32" in refused(path, tmp_path, capsys)
    save_file({key: value for key, value in arrays.items() if key != "stem.conv1.weight"}, path)
    assert "missing: stem.conv1.weight" in refused(path, tmp_path, capsys)
    assert "missing" in refused(path, tmp_path, capsys, "--num-classes", "5", "--image-size", "192")


def test_what_is_missing_is_said(arrays, tmp_path, capsys):
    save_file(arrays, tmp_path / "in.safetensors")
    assert "there is no checkpoint" in refused(tmp_path / "nothing.pth", tmp_path, capsys)
    assert commands.main(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "dest")]) == 2
    assert "does not say which model it is of: give --model" in capsys.readouterr().err
    (tmp_path / "names").write_text("cat\ndog\n")
    message = refused(tmp_path / "in.safetensors", tmp_path, capsys, "--classes", str(tmp_path / "names"))
    assert "there are 2 names of 3 classes" in message
    message = refused(tmp_path / "in.safetensors", tmp_path, capsys, "--class-map", str(tmp_path / "names"))
    assert "is no class map" in message


def test_safetensors_are_told_by_their_content(tmp_path):
    """A header of 128 bytes begins with the byte that pickles begin with."""
    path = tmp_path / "weights.bin"
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(128)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    source = read_source(path)
    assert source.kind == "safetensors" and source.tensors["a"].shape == (2,)
