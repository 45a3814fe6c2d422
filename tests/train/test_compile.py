"""The step that `plan --compile` compiles is the one of training, and its report says what a script needs.

The compiler is the CPU's here, which stands for a GPU's; tests/test_accelerators.py asks the TPU's.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from maxmap import training_commands
from maxmap.__main__ import main
from maxmap.accelerators import program, topology
from maxmap.config import bind
from maxmap.errors import UserError
from maxmap.sharding import make_mesh
from maxmap.train import build
from maxmap.train.compile import compile_step, describe_step
from tests.tiny import settings_for

KEYS = {
    *("model", "hardware", "devices", "topology", "mesh", "dtype", "images_per_device", "images_per_second", "flops"),
    *(
        "share_of_peak",
        "network_seconds",
        "seconds",
        "cycles",
        "bytes",
        "bytes_accessed",
        "collectives",
        "instructions",
    ),
    *("kernels", "parts", "operations", "not_counted", "memory", "fits", "compiler", "jax", "compile_seconds"),
}


@pytest.fixture
def cpu_compiler(monkeypatch):
    monkeypatch.setattr(topology, "devices_of", lambda hardware, devices: jax.devices()[:devices])
    monkeypatch.setattr(topology, "compiler", lambda hardware: "the CPU's 1.0")
    monkeypatch.setattr(topology, "options_of", lambda hardware: {})
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # the tests keep their cache


@pytest.fixture
def recipe(tiny_models):
    return bind(settings_for(None, batch_size=32, accumulate=2, mesh={"fsdp": 2}, model={"name": "tiny", "width": 64}))


@pytest.mark.usefixtures("cpu_compiler")
def test_the_report_of_a_step(recipe, tmp_path, capsys, monkeypatch):
    found = compile_step(recipe, 8, "h100-80", tmp_path / "step.hlo")
    assert found.keys() == KEYS
    assert found["mesh"] == {"data": 4, "fsdp": 2} and found["images_per_device"] == 4
    assert found["images_per_second"] == pytest.approx(32 / found["seconds"])
    assert found["share_of_peak"] == pytest.approx(found["flops"] / found["seconds"] / 989e12)
    assert sum(row["share"] for row in found["parts"]) == pytest.approx(1)
    assert {"conv", "norm", "mlp", "head_0"} <= {row["module"] for row in found["parts"]}
    assert {"forward", "backward"} <= {row["pass"] for row in found["parts"]}
    assert (tmp_path / "step.hlo").read_text().startswith("HloModule jit_step")
    text = describe_step(found)
    assert "These are estimates of the compiler, the CPU's 1.0 (jax " in text and "not measurements" in text
    assert "all-reduce" in text and "dearest parts" in text
    monkeypatch.setattr(training_commands, "read", lambda config, overrides: recipe.values)
    assert main(["plan", "--config=quickstart", "--devices=8", "--hardware=h100-80", "--compile", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == KEYS
    with pytest.raises(
        UserError, match=r"cannot write .*no/step.hlo \(No such file or directory\): give another --save"
    ):
        compile_step(recipe, 8, "h100-80", tmp_path / "no" / "step.hlo")


@pytest.mark.usefixtures("cpu_compiler")
def test_it_is_the_step_of_training(recipe):
    images = build.Images(8, 1000, (0.5,) * 3, (0.25,) * 3)
    step = build.make_step(recipe, make_mesh(fsdp=2), images, 10)
    found = compile_step(recipe, 8, "h100-80")
    assert (
        found["memory"]["arguments"]
        == step.function.lower(*step.arguments()).compile().memory_analysis().argument_size_in_bytes
    )
    assert step.batch["image"].shape == (32, 8, 8, 3) and step.batch["image"].dtype == jnp.uint8


@pytest.mark.usefixtures("cpu_compiler")
def test_a_step_that_does_not_fit_is_one_sentence():
    class Function:
        def trace(self, *arguments):
            return self

        def lower(self):
            return self

        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 32.00G of 15.75G.\nBuffers:"
            )

    with pytest.raises(
        UserError,
        match=r"does not fit a tpu-v5e, says its compiler \(Ran out of memory on HBM, 32.00G of 15.75G\): raise",
    ):
        program.compile_for("tpu-v5e", Function())
