"""Checkpoints come back bit by bit, on any devices; reading them needs no model."""

import hashlib
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap import checkpoint
from maxmap.__main__ import main
from maxmap.checkpoint import Checkpoints, read_info, read_variables
from maxmap.errors import UserError
from maxmap.sharding import make_mesh
from maxmap.train.state import TrainState, abstract, create
from tests.tiny import Tiny, assert_equal, copied, files

pytestmark = pytest.mark.usefixtures("quick_compilation")

INFO = {"model": {"name": "tiny", "num_classes": 3}, "classes": ["a", "b", "c"]}


def state(seed: int = 0, *, ema: bool = True) -> TrainState:
    """A state in which every value differs from its initial one."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    zero = create(Tiny(3), optax.adamw(1e-3), jax.random.key(0), images, ema=ema)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype), zero)


@pytest.fixture
def workdir(tmp_path):
    """Steps 2, 5 and 7 were saved, with two to keep."""
    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    for step in (2, 5, 7):
        checkpoints.save(step, state(step).items(), {**INFO, "saved": step})
    checkpoints.close()
    return tmp_path / "run"


def test_all_of_the_state_comes_back(workdir):
    checkpoints = Checkpoints(workdir)
    assert checkpoint.newest_step(workdir) == 7
    for step in (5, 7):
        like = abstract(jax.eval_shape(lambda: state()), make_mesh(data=1))
        restored = TrainState.from_items(checkpoints.restore(step, like.items()))
        assert_equal(copied(restored), copied(state(step)))
    checkpoints.close()


def test_it_comes_back_on_another_mesh(workdir):
    checkpoints = Checkpoints(workdir)
    for devices in (8, 1):
        mesh = make_mesh(data=devices)
        like = abstract(jax.eval_shape(lambda: state()), mesh)
        restored = TrainState.from_items(checkpoints.restore(7, like.items()))
        assert_equal(copied(restored), copied(state(7)))
        assert all(leaf.sharding.device_set == set(mesh.devices.flat) for leaf in jax.tree.leaves(restored))
        # Written from these devices, read on the others.
        other = Checkpoints(workdir.with_name(f"from_{devices}"))
        other.save(1, restored.items(), INFO)
        other.close()
        variables, _ = read_variables(workdir.with_name(f"from_{devices}"), ema=False)
        assert_equal(variables, copied(state(7).variables()))
    checkpoints.close()


def test_the_newest_are_kept(workdir):
    assert {path.name for path in (workdir / checkpoint.FOLDER).iterdir()} == {"5", "7"}


def test_a_step_that_exists_is_kept(workdir):
    before = files(workdir)
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(7, state(70).items(), INFO)
    checkpoints.close()
    assert files(workdir) == before


def test_waiting_makes_a_step_readable(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(3).items(), INFO)
    checkpoints.wait()
    assert read_info(tmp_path) == {**INFO, "step": 3}
    checkpoints.close()


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    # The next step overwrites the buffers of the state while the checkpoint is being written.
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    now = jax.jit(lambda: jnp.zeros((4_000_000,)))()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"variables": {"params": {"w": now}}}, INFO)
    for _ in range(3):
        now = advance(now)
    checkpoints.close()
    variables, _ = read_variables(tmp_path)
    assert not variables["params"]["w"].any()


def test_the_average_is_preferred(workdir):
    variables, info = read_variables(workdir)
    assert_equal(variables, copied(state(7).ema))
    assert info == {**INFO, "saved": 7, "step": 7, "weights": "ema"}
    variables, info = read_variables(workdir, ema=False)
    assert_equal(variables, copied(state(7).variables()))
    assert info["weights"] == "raw"


def test_without_an_average_the_raw_ones_are_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1, ema=False).items(), INFO)
    checkpoints.close()
    variables, info = read_variables(tmp_path)
    assert_equal(variables, copied(state(1, ema=False).variables()))
    assert info["weights"] == "raw"
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))


def test_where_there_is_nothing(tmp_path):
    (tmp_path / "empty" / checkpoint.FOLDER).mkdir(parents=True)
    for folder in ("missing", "empty"):
        assert read_info(tmp_path / folder) is None
        with pytest.raises(UserError, match=f"no checkpoint in .*{folder}: give the folder of a run"):
            read_variables(tmp_path / folder)
    assert not (tmp_path / "missing").exists()


def step_folder(workdir, step: int):
    return workdir / checkpoint.FOLDER / str(step)


def largest(folder):
    """The file with the most bytes: values of the arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    path = largest(folder)
    os.truncate(path, path.stat().st_size // 2)
    return path


def flip_a_bit(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def lose_a_file(folder):
    path = largest(folder)
    path.unlink()
    return path


@pytest.mark.fault("checkpoint damaged after it was written")
@pytest.mark.parametrize("harm", [truncate, flip_a_bit, lose_a_file])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(workdir, capfd, harm):
    path = harm(step_folder(workdir, 7))
    assert read_info(workdir)["step"] == 5
    said = capfd.readouterr().err
    assert "step 7" in said and "using step 5 instead" in said and path.name in said and said.count("\n") == 1
    variables, info = read_variables(workdir)
    assert_equal(variables, copied(state(5).ema))
    assert info["step"] == 5
    # It is written anew when the run comes to it again.
    checkpoints = Checkpoints(workdir)
    checkpoints.save(7, state(7).items(), INFO)
    checkpoints.close()
    assert_equal(read_variables(workdir)[0], copied(state(7).ema))


def test_where_all_are_damaged(workdir):
    for step in (5, 7):
        flip_a_bit(step_folder(workdir, step))
    with pytest.raises(UserError, match=r"step 7 .* is damaged .*; .*step 5 .* is damaged .* there is no other"):
        read_info(workdir)


@pytest.mark.fault("crash in the middle of a save")
def test_an_unfinished_step_does_not_count(workdir):
    unfinished = step_folder(workdir, 9).with_name("9.orbax-checkpoint-tmp")
    unfinished.mkdir()
    (step_folder(workdir, 7) / checkpoint.SUMS).unlink()  # renamed, but not yet looked through
    assert read_info(workdir)["step"] == 5
    Checkpoints(workdir).close()
    assert not unfinished.exists()


def test_sums_are_those_of_sha256sum(workdir):
    sums = (step_folder(workdir, 7) / checkpoint.SUMS).read_text().splitlines()
    assert len(sums) > 5
    for line in sums:
        digest, name = line.split("  ")
        assert hashlib.sha256((step_folder(workdir, 7) / name).read_bytes()).hexdigest() == digest


def test_the_best_is_kept(tmp_path):
    for part in ({1: 50.0, 2: 90.0, 3: None}, {4: 70.0, 5: 60.0, 6: None}):  # a run and its continuation
        checkpoints = Checkpoints(tmp_path, keep=2)
        for step, score in part.items():
            checkpoints.save(step, {"variables": {"w": jnp.zeros(3)}}, INFO, score)
        checkpoints.close()
    assert checkpoint.finished_steps(tmp_path) == [2, 5, 6]
    assert read_info(tmp_path, 2) == {**INFO, "step": 2, "score": 90.0}


@pytest.mark.fault("disk full while saving")
def test_a_full_disk_costs_no_checkpoint(workdir):
    # A limit on the size of files stands for the disk: it needs no rights.
    before = files(workdir)
    checkpoints = Checkpoints(workdir, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        checkpoints.save(9, {"variables": {"w": np.random.default_rng(0).normal(size=100_000)}}, INFO)
        with pytest.raises(
            UserError, match=r"cannot take step 9 .*the last good checkpoint is step 7: make room"
        ) as error:
            checkpoints.wait()
        assert str(error.value).rstrip(".").count(". ") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.close()
    assert read_info(workdir)["step"] == 7
    assert before.items() <= files(workdir).items()
    again = Checkpoints(workdir, keep=2)
    again.save(9, state(9).items(), INFO)
    again.close()
    assert read_info(workdir)["step"] == 9


@pytest.mark.fault("checkpoint folder cannot be written")
def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written to .*there is no checkpoint yet"):
        Checkpoints(tmp_path)


def test_an_average_by_hand(workdir, tmp_path):
    variables, info = checkpoint.average_checkpoints([workdir], last=2)
    wanted = jax.tree.map(
        lambda a, b: ((a.astype("f8") + b) / 2).astype(a.dtype), *(copied(state(s).ema) for s in (5, 7))
    )
    assert_equal(variables, wanted)
    assert info["weights"] == "ema" and info["averaged"] == [[str(workdir), 7], [str(workdir), 5]]
    with pytest.raises(UserError, match="has 2 whole checkpoints, but --last is 3"):
        checkpoint.average_checkpoints([workdir], last=3)
    other = Checkpoints(tmp_path / "other")
    other.save(1, state(1).items(), {**INFO, "model": {"name": "another"}})
    other.close()
    with pytest.raises(UserError, match="different models"):
        checkpoint.average_checkpoints([workdir, tmp_path / "other"])


def test_the_average_alone_is_a_checkpoint(workdir, tmp_path, capsys):
    assert main(["average", str(workdir), "--out", str(tmp_path / "ema")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ema'}: ema weights of {workdir} step 7\n"
    variables, info = read_variables(tmp_path / "ema")
    assert_equal(variables, copied(state(7).ema))
    assert info["weights"] == "ema" and info["model"] == INFO["model"] and info["step"] == 7
    assert not (step_folder(tmp_path / "ema", 7) / "training").exists()
    assert main(["average", str(workdir), "--out", str(tmp_path / "ema")]) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert main(["average", str(workdir), "--raw", "--last=2", "--out", str(tmp_path / "raw")]) == 0
    assert read_variables(tmp_path / "raw")[1]["weights"] == "raw"
