"""Checkpoints come back bit by bit, on any devices; reading them needs no model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap import checkpoint
from maxmap.checkpoint import Checkpoints, read_info, read_variables, write_text
from maxmap.errors import UserError
from maxmap.sharding import make_mesh
from maxmap.train.state import TrainState, abstract, create
from tests.tiny import Tiny, assert_equal, compile_quickly, copied, files

INFO = {"model": {"name": "tiny", "num_classes": 3}, "classes": ["a", "b", "c"]}


@pytest.fixture(scope="module", autouse=True)
def quick():
    with compile_quickly():
        yield


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
    assert checkpoints.latest_step() == 7
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


def test_an_unfinished_step_does_not_count(workdir):
    # What a crash in the middle of saving leaves.
    (workdir / checkpoint.FOLDER / "9.orbax-checkpoint-tmp").mkdir()
    assert read_info(workdir)["step"] == 7


def test_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    write_text(path, "old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="crash"):
        patch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("crash")))
        write_text(path, "new and longer")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
