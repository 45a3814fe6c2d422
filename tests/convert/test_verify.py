"""What verify measures, and that it notices a wrong value."""

import json

import numpy as np
import pytest

from maxmap import __main__ as commands
from maxmap import checkpoint
from maxmap.convert.load import convert
from maxmap.convert.torch import to_torch
from maxmap.convert.verify import verify
from maxmap.models import create_model
from tests.convert.test_torch import random_variables
from tests.reference import import_timm
from tests.tiny import compile_quickly

safetensors = pytest.importorskip("safetensors.numpy")


def write(name, path, **fields):
    model = create_model(name, num_classes=5, **fields)
    variables = random_variables(model)
    arrays = {key: np.ascontiguousarray(value) for key, value in to_torch(variables, model).items()}
    safetensors.save_file(arrays, path)
    return variables, model


@pytest.mark.long
def test_both_run_and_agree(tmp_path, capsys):
    import_timm()
    source, dest = tmp_path / "in.safetensors", tmp_path / "dest"
    write("test_coatnet", source)
    convert(source, dest, name="test_coatnet")
    with compile_quickly():
        assert commands.main(["verify", str(dest), "--against", str(source)]) == 0
        printed = capsys.readouterr().out
        assert "95 of 95 entries" in printed and "float64 against timm" in printed and "\nok;" in printed
        report = json.loads((dest / "verify.json").read_text())
        assert report["float64"]["logits"] < 1e-9 and report["float64"]["gradient"] < 1e-9
        assert len(report["float64"]["features"]) == 5 and max(report["float64"]["features"]) < 1e-9
        assert report["float32"]["top1"] == report["float64"]["top1"] == 1
        # The tolerance of another network, and one value that is not the source's.
        assert commands.main(["verify", str(dest), "--against", str(source), "--tolerance", "1e-20"]) == 1
        variables, info = checkpoint.read_variables(dest)
        kernel = np.array(variables["params"]["backbone"]["stem"]["conv1"]["kernel"])
        kernel[0, 0, 0, 0] += 1e-3
        variables["params"]["backbone"]["stem"]["conv1"]["kernel"] = kernel
        checkpoint.write_variables(tmp_path / "wrong", variables, info)
        report = verify(tmp_path / "wrong", source)
    assert not report["ok"] and report["identical"] == 94 and report["float64"]["logits"] > 1e-9


def test_without_a_reference_the_values_are_compared(tmp_path, capsys):
    source, dest = tmp_path / "in.safetensors", tmp_path / "dest"
    write("pit_s", source)
    convert(source, dest, name="pit_s")
    assert commands.main(["verify", str(dest), "--against", str(source)]) == 0
    printed = capsys.readouterr().out
    assert "no installed reference implementation" in printed and "have the same bits" in printed
    arrays = safetensors.load_file(source)
    safetensors.save_file({key: value + 1 for key, value in arrays.items()}, source)
    assert commands.main(["verify", str(dest), "--against", str(source)]) == 1
