"""What the TPU's compiler says of our programs, compiled here: no slower than benchmarks/accelerators.csv has it."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from benchmarks import accelerators
from maxmap.__main__ import main
from maxmap.errors import UserError
from tests.tiny import ROOT

SLOWER = 1.1  # past which a program's cycles are a fault
STORE = 'make accelerators ARGS="small --store"'
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is installed for Python 3.11 on Linux (x86-64) alone: requirements-test.txt",
)
# A kernel with a loop, in a program with a loop around it.
KERNEL = """
import json
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import SingleDeviceSharding
from maxmap.accelerators import program, topology

def kernel(x, o):
    o[...] = jax.lax.fori_loop(0, 7, lambda i, a: jnp.exp(a) * x[...], x[...])

def double(x):
    block = pl.BlockSpec((128, 128), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, shape, grid=(8,), in_specs=[block], out_specs=block, name="powers_1024")(x)

def run(x):
    return jax.lax.scan(lambda x, _: (double(x) + 1, None), double(x), None, length=3)[0]

sharding = SingleDeviceSharding(topology.devices_of("tpu-v5e", 1)[0])
x = jax.ShapeDtypeStruct((1024, 128), jnp.float32, sharding=sharding)
print(json.dumps(program.compile_for("tpu-v5e", jax.jit(run), x)[0]))
"""


def run(*arguments: str) -> dict:
    """Runs Python without the tests' settings; returns the JSON that it prints last."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout[finished.stdout.index("{") :])


@needs_libtpu
@pytest.mark.parametrize("name", accelerators.CHECKED)
def test_no_program_is_slower_than_the_stored_figures(name):
    """A program that did not change is not compiled again: the same compiler says the same."""
    found, before = run("-m", "benchmarks.accelerators", "--one", name), accelerators.stored()[name]
    assert found["compiler"] == before["compiler"], f"store the figures of this compiler: {STORE}"
    assert found["note"] == ""
    assert found["mcycles"] <= SLOWER * float(before["mcycles"]), f"if that is wanted: {STORE}"


@needs_libtpu
def test_a_kernel_counts_what_its_schedule_and_its_grid_say():
    found = run("-c", KERNEL)
    (row,) = found["kernels"]
    assert (row["name"], row["programs"], row["calls"], row["complete"]) == ("powers_1024", 8, 4, True)
    assert found["not_counted"] == []
    # 16 vectors of 8 x 128 a program, seven exponentials and products of each: at least a bundle for every one.
    assert row["bundles"] >= 7 * 16
    assert row["cycles"] == pytest.approx(8 * row["bundles"], rel=0.1)
    assert found["cycles"] >= 4 * row["cycles"]


@pytest.mark.parametrize(("hardware", "extra"), [("tpu-v5e", "aot-tpu"), ("h100-80", "aot-gpu")])
def test_a_compiler_that_is_not_installed_is_one_sentence(hardware, extra, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ["plan", "--compile", f"--hardware={hardware}", "--devices=8", f"--config={QUICKSTART}"]
    assert main(command) == 2
    assert f"the compiler for {hardware} is not installed: pip install '.[{extra}]'" in capsys.readouterr().err


def test_what_there_is_nothing_to_save_of(capsys):
    assert main(["plan", "--devices=8", f"--config={QUICKSTART}", "--save=step.hlo"]) == 2
    assert "give --compile, too" in capsys.readouterr().err


def test_the_table_of_programs(tmp_path, monkeypatch):
    names = accelerators.ROWS
    assert {*accelerators.CHECKED} <= {*accelerators.QUICK} < {*names}
    assert sum(name.startswith("step") for name in names) == len(accelerators.MODELS) + 1
    monkeypatch.setattr(accelerators, "STORED", tmp_path / "stored.csv")
    row = {"program": "head", "target": "tpu-v5e", "mcycles": 30.0, "milliseconds": 20.0, "bytes_gb": 1.0}
    row |= {"accessed_gb": 2.0, "temporaries_gb": 0.64, "images": 64, "collectives": 0, "compile_seconds": 9}
    row |= {"compiler": "libtpu 1", "note": "", "digest": "of the program"}
    missing = {"program": "half stage 0", "note": "the compiler is not installed"}
    accelerators.store([row, missing, row | {"program": "small head", "unchanged": True}])
    assert list(accelerators.stored()) == ["head"]
    line = accelerators.line({**row, "mcycles": 33.0, "milliseconds": 22.0}, accelerators.stored()["head"])
    assert line.startswith("| head | tpu-v5e | 33.0 (30.0) | 22.0 (20.0) | +10.0 % |") and "| 10.0 |" in line


def test_the_compiler_belongs_to_the_version_of_jax():
    wanted = [line for line in (ROOT / "requirements-test.txt").read_text().splitlines() if line.startswith("libtpu")]
    (needed,) = [each for each in importlib.metadata.requires("jax") if each.startswith("libtpu")]
    if importlib.metadata.version("jax") == "0.10.2":
        assert needed.partition("==")[2].partition("*")[0] in wanted[0]


def test_only_a_program_that_changed_is_compiled(tmp_path, monkeypatch):
    """By its text, its compiler and the files that count; a row whose figures are in the file returns them."""
    monkeypatch.setattr(accelerators, "STORED", tmp_path / "stored.csv")
    monkeypatch.setattr(accelerators.program.topology, "compiler", lambda hardware: "a compiler")
    programs = [jax.jit(function).lower(1.0) for function in (lambda x: x + 1, lambda x: x + 2)]
    wrapped = [accelerators.program.Lowered("tpu-v5e", None, lowered, 0.0) for lowered in (*programs, programs[0])]
    digests = [accelerators.program.digest(each) for each in wrapped]
    assert digests[0] == digests[2] != digests[1]
    others = [accelerators.program.digest(wrapped[0]._replace(hardware="tpu-v6e"))]
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "--another=flag")
            others.append(accelerators.program.digest(wrapped[0]))
    with monkeypatch.context() as patch:
        patch.setattr(accelerators.program.topology, "compiler", lambda hardware: "another compiler")
        others.append(accelerators.program.digest(wrapped[0]))
    assert len({*others, *digests}) == 6
    row = dict.fromkeys(accelerators.NUMBERS, 2) | {"program": "head", "target": "tpu-v5e", "compiler": "a compiler"}
    accelerators.store([row | {"mcycles": None, "digest": digests[0]}])
    monkeypatch.setitem(accelerators.ROWS, "head", accelerators.ROWS["head"]._replace(lower=lambda: wrapped[2]))
    found = accelerators.found_in("head")
    assert found["unchanged"] and found["mcycles"] is None and found["milliseconds"] == 2
    assert "not compiled again" in accelerators.line(found, accelerators.stored()["head"])

    def compiled(lowered):
        raise UserError(f"compiles {lowered is wrapped[0]}")

    monkeypatch.setattr(accelerators.program, "compile_lowered", compiled)
    monkeypatch.setitem(accelerators.ROWS, "head", accelerators.ROWS["head"]._replace(lower=lambda: wrapped[1]))
    assert accelerators.found_in("head")["note"] == "compiles False"
    monkeypatch.setitem(accelerators.ROWS, "head", accelerators.ROWS["head"]._replace(lower=lambda: wrapped[0]))
    assert accelerators.found_in("head", again=True)["note"] == "compiles True"
