"""`python -m maxmap benchmark`: what it measures and says."""

import dataclasses
import json

import jax
import pytest

from maxmap import models
from maxmap.__main__ import main
from tests.marks import cases
from tests.test_grid import BACKBONES


@pytest.mark.parametrize("task", cases(["forward pass", "training step"], long=["training step"]))
def test_a_benchmark_says_what_it_measured(task, tmp_path, capsys, monkeypatch, quick_compilation):
    name, fields = BACKBONES["mobilenet"]
    monkeypatch.setitem(models.MODELS, name, dataclasses.replace(models.MODELS[name], fields=fields))
    train = ["--train"] * (task == "training step")
    command = ["benchmark", name, "--image-size=32", "--batch-size=8", "--seconds=0.01"]
    assert main([*command, *train, f"--json={tmp_path / 'result.json'}"]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"{name}, {task}, 8 images of 32 px, float32, on {jax.device_count()} x cpu" in out
    assert result["parameters"] == 17_964 and "17,964 parameters" in out
    assert result["batches"] >= 5
    assert result["milliseconds_low"] <= result["milliseconds"] <= result["milliseconds_high"]
    assert result["images_per_second"] == pytest.approx(8e3 / result["milliseconds"])


def test_mistakes_are_one_sentence(capsys):
    assert main(["benchmark", "mobilenet_v2"]) == 2
    assert "there is no model 'mobilenet_v2'; the nearest names are mobilenet_v1" in capsys.readouterr().err
    assert main(["benchmark", "mobilenet_v1", "--batch-size=9"]) == 2
    assert "the batch size 9 does not divide over 8 devices; the nearest that does is 8" in capsys.readouterr().err
