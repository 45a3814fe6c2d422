"""Devices change nothing: a step on eight is the step on one, however the state lies on them."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from maxmap import sharding
from maxmap.errors import UserError
from maxmap.losses import total_loss
from maxmap.models import create_model
from maxmap.sharding import (
    DATA,
    FSDP,
    check_batch,
    gather,
    make_mesh,
    replicated,
    split_batch,
    state_sharding,
    to_devices,
)
from maxmap.train.plan import _traffic as planned_traffic
from maxmap.train.state import TrainState, abstract, create
from maxmap.train.step import cast, make_train_step
from tests.collectives import collectives, on_tpu
from tests.marks import cases
from tests.tiny import Tiny
from tests.zoo import filled

pytestmark = pytest.mark.usefixtures("quick_compilation")

IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)

MODEL = {
    "name": "map_maxvit_mini_32",
    "num_classes": 3,
    "image_size": 8,
    "window_size": 2,
    "stem_width": (8, 8),
    "embed_dim": (8,),
    "depths": (1,),
    "block_types": ("M",),
    "strides": (2,),
    "transformer": {"head_dim": 8},
    "drop_path": 0.5,
    "head": {"channels": 8, "level": 0, "gram_channels": 4, "gram_groups": 2, "heads": 2, "mlp_ratio": 2.0},
}


# The tests' network is small: let arrays of few values be split.
@pytest.fixture
def split_small(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_PART", 1)


def start(model, optimizer, variables=None) -> TrainState:
    """A first state in float64, with averages; of the model's initial variables where none are given."""
    if variables is None:
        variables = cast(dict(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))), jnp.float64)
    variables = dict(variables)
    params = variables.pop("params")
    ema = jax.tree.map(jnp.copy, {"params": params, **variables})
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params), ema)


def prepare(key, images, labels):
    flip = jax.random.bernoulli(key, shape=images.shape[:1])[:, None, None, None]
    images = jnp.where(flip, images[:, :, ::-1], images)
    return images / 255, jax.nn.one_hot(labels, 3, dtype=jnp.float64)


def batches(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8),
            "label": rng.integers(0, 3, 16).astype(np.int32),
        }
        for _ in range(count)
    ]


def compiled_step(model, optimizer, state, mesh, **options):
    """The step as a run compiles it, and the state on the mesh."""
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract(jax.eval_shape(lambda: state), mesh))
    step = make_train_step(model, optimizer, total_loss, prepare, mesh=mesh, **options)
    same, split = replicated(mesh), split_batch(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(where, {"image": split, "label": split}, same),
        out_shardings=(where, same),
        donate_argnums=0,
    )
    key = jax.device_put(jax.random.key(1), same)
    state = jax.device_put(jax.tree.map(jnp.copy, state), where)
    return jitted.lower(state, to_devices(batches(1)[0], mesh), key).compile(), state, key


MESHES = {"1x1": (1, 1), "8x1": (8, 1), "4x2": (4, 2), "1x8": (1, 8)}


@pytest.mark.usefixtures("x64", "split_small")
@pytest.mark.parametrize("kind", cases(["tiny", "map_maxvit"], long=["map_maxvit"]))
def test_every_mesh_trains_as_one_device_does(kind):
    # Batch norm over the whole batch, drop path and dropout with masks that do not know the devices, micro-batches,
    # recomputed blocks. Not Adam: it blows up the rounding in gradients that are zero by nature (biases that a norm or
    # softmax cancels).
    optimizer = optax.sgd(1e-2, momentum=0.9)
    if kind == "tiny":
        model = recomputed = Tiny(3, drop_path=0.5, dropout=0.5)
        first = start(model, optimizer)
    else:
        model, recomputed = (create_model(**MODEL, remat=remat) for remat in (False, True))
        first = start(model, optimizer, jax.tree.map(jnp.asarray, filled(model, (8, 8))))

    def train(data, fsdp):
        mesh = make_mesh(data=data, fsdp=fsdp)
        shared = recomputed if fsdp > 1 else model
        step, state, key = compiled_step(shared, optimizer, first, mesh, dtype=jnp.float64, ema_decay=0.5, accumulate=2)
        losses = []
        for batch in batches(4):
            state, metrics = step(state, to_devices(batch, mesh), key)
            losses.append(float(metrics["loss"]))
        return jax.device_get(state), losses

    results = {name: train(*MESHES[name]) for name in ("1x1", "4x2")}
    one, losses = results.pop("1x1")
    for name, (state, sharded) in results.items():
        np.testing.assert_allclose(sharded, losses, rtol=1e-9, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), state, one)
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), one.model_state["batch_stats"], first.model_state["batch_stats"]
    )
    assert all(jax.tree.leaves(moved)) and len(set(losses)) == 4


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.usefixtures("split_small")
@pytest.mark.parametrize("name", ["8x1", "4x2", "1x8"])
def test_what_a_step_sends(name):
    # Parameters are gathered once, gradients summed once; nothing of the optimizer or the average travels, no image.
    data, fsdp = MESHES[name]
    model, optimizer = Tiny(8, width=64, constant=False), optax.adamw(1e-3)
    state = create(model, optimizer, jax.random.key(0), IMAGES, ema=True)
    mesh = make_mesh(data=data, fsdp=fsdp)

    def eight(key, images, labels):
        return images / 255.0, jax.nn.one_hot(labels, 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "prepare", eight)
        step, _, _ = compiled_step(model, optimizer, state, mesh, ema_decay=0.5)
    sent = collectives(step.as_text())
    by_kind = {kind: sum(bytes for k, bytes, _ in sent if k == kind) for kind in {kind for kind, *_ in sent}}
    split = [p for p in jax.tree.leaves(state.params) if not state_sharding(p.shape, mesh).is_fully_replicated]
    # Beside the gradients: batch norm sums two numbers per channel forward and two backward.
    few = 4 * 1024
    if fsdp == 1:
        assert by_kind.keys() == {"all-reduce"} and not split
    else:
        assert len(split) == 9  # convolution; norm, mlp and two heads with two arrays each
        assert by_kind["all-gather"] == pytest.approx(size(split), abs=few)
    # First over "fsdp", after which a device keeps its part (one reduce-scatter where XLA has that, which it has not on
    # CPUs), then the part over "data".
    summed = size(state.params) + (size(split) / fsdp if data > 1 else 0)
    assert by_kind["all-reduce"] + by_kind.get("reduce-scatter", 0) == pytest.approx(summed, abs=few)
    assert by_kind.keys() <= {"all-reduce", "all-gather", "reduce-scatter"}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
@pytest.mark.parametrize(("data", "fsdp"), cases([(2, 2), (4, 4)], long=[(2, 2)]))
def test_what_a_step_sends_on_tpus(data, fsdp):
    """The TPU's compiler adds up and scatters in one, and the plan counts what it sends."""
    sent = on_tpu(data * fsdp, fsdp)
    mesh = AbstractMesh((data, fsdp), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)
    model = Tiny(128, width=256, constant=False)
    params = jax.eval_shape(
        lambda: cast(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"], jnp.bfloat16)
    )
    split = [p for p in jax.tree.leaves(params) if not state_sharding(p.shape, mesh).is_fully_replicated]
    assert len(split) == 3 and size(split) > 0.9 * size(params)  # the kernels of mlp and heads
    whole = size(params) - size(split)
    few = 4 * 4 * 256 + 2 * whole  # batch norm's sums; what stays whole may be summed in float32
    of = {
        (kind, group): [n for k, n, g in sent if (k, g) == (kind, group)]
        for kind, group in {(kind, group) for kind, _, group in sent}
    }
    assert of.keys() == {
        ("all-gather", fsdp),  # parameters
        ("reduce-scatter", fsdp),  # their gradients
        ("all-reduce", data),  # the parts of these
        ("all-reduce", mesh.size),  # gradients of what every device holds, and batch norm's sums
    }
    assert len(of["all-gather", fsdp]) == 2  # both heads at once
    assert sum(of["all-gather", fsdp]) == size(split)
    assert sum(of["reduce-scatter", fsdp]) == sum(of["all-reduce", data]) == size(split) / fsdp
    largest = max(n.size for n in jax.tree.leaves(params) if state_sharding(n.shape, mesh).is_fully_replicated)
    assert max(of["all-reduce", mesh.size]) <= 4 * largest
    assert whole <= sum(of["all-reduce", mesh.size]) <= whole + few
    plan = planned_traffic(params, mesh, accumulate=1)
    assert plan["parameters gathered"] == sum(of["all-gather", fsdp]) * (fsdp - 1) / fsdp
    assert plan["gradients summed over fsdp"] == sum(of["reduce-scatter", fsdp]) * (fsdp - 1)
    parts = 2 * sum(of["all-reduce", data]) * (data - 1) / data
    assert plan["gradients summed over data"] == parts + 2 * whole * (mesh.size - 1) / mesh.size


@pytest.mark.parametrize(("data", "fsdp"), [(4, 2), (1, 8)])
def test_small_arrays_are_gathered_together(data, fsdp):
    # Twelve arrays of three shapes, one of them too large to wait for the others.
    mesh = make_mesh(data=data, fsdp=fsdp)
    shapes = [(256, 128)] * 5 + [(128, 256)] * 5 + [(512, 512)] * 2
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    placed = [jax.device_put(x, state_sharding(x.shape, mesh)) for x in arrays]
    assert not any(x.sharding.is_fully_replicated for x in placed)
    step = jax.jit(lambda arrays: gather(arrays, mesh)).lower(placed).compile()
    assert [kind for kind, *_ in collectives(step.as_text())] == ["all-gather"] * 4
    for got, wanted in zip(step(placed), arrays, strict=True):
        assert got.sharding.is_fully_replicated
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.usefixtures("split_small")
def test_nothing_is_replicated_that_can_be_split():
    mesh = make_mesh(data=2, fsdp=4)
    state = create(Tiny(8, width=64), optax.adamw(1e-3), jax.random.key(0), IMAGES, ema=True)
    state = jax.device_put(
        state, jax.tree.map(lambda leaf: leaf.sharding, abstract(jax.eval_shape(lambda: state), mesh))
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        held = leaf.addressable_shards[0].data.size
        divisible = any(n % 4 == 0 for n in leaf.shape)
        assert held == (leaf.size // 4 if divisible else leaf.size), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((128, 256), ("fsdp",)),
        ((256, 128), ("fsdp",)),
        ((256, 64), (None, "fsdp")),  # shorter than a TPU's lanes
        ((64, 64, 64), (None, "fsdp")),
        ((3, 3, 64, 64), (None, None, "fsdp")),
        ((3, 3, 1, 2048), (None, None, None, "fsdp")),
        ((7, 4096), (None, "fsdp")),
        ((4098, 3), ()),  # nothing that four divides
        ((128, 96), ()),  # too small
        ((16384,), ("fsdp",)),
        ((), ()),
    ],
)
def test_an_array_lies_by_its_shape(shape, axes):
    assert state_sharding(shape, make_mesh(fsdp=4)).spec == PartitionSpec(*axes)
    assert state_sharding(shape, make_mesh(fsdp=1)).is_fully_replicated


def test_a_mesh_has_the_devices_asked_for():
    for (data, fsdp), got in {(-1, 1): (8, 1), (1, 1): (1, 1), (3, 1): (3, 1), (-1, 4): (2, 4), (1, 8): (1, 8)}.items():
        mesh = make_mesh(data=data, fsdp=fsdp)
        assert mesh.shape == {"data": got[0], "fsdp": got[1]}
        assert set(mesh.devices.flat) <= set(jax.devices())


@pytest.mark.parametrize("devices", [0, 9])
def test_devices_that_there_are_not(devices):
    with pytest.raises(UserError, match=rf"config.mesh.data is {devices}, but JAX sees 8 devices: .* -1 for all"):
        make_mesh(data=devices)


def test_parts_that_there_are_not():
    with pytest.raises(
        UserError, match=r"config.mesh.fsdp is 3, which does not divide 8 devices: give one of 1, 2, 4, 8"
    ):
        make_mesh(fsdp=3)
    with pytest.raises(UserError, match=r"config.mesh.fsdp is 16, but JAX sees 8 devices"):
        make_mesh(fsdp=16)
    with pytest.raises(UserError, match=r"config.mesh.data is 8, times config.mesh.fsdp 2, but JAX sees 8"):
        make_mesh(data=8, fsdp=2)


@pytest.mark.parametrize(("size", "nearest"), [(12, 16), (9, 8), (3, 8), (1, 8), (23, 24)])
def test_a_batch_that_does_not_divide(size, nearest):
    with pytest.raises(UserError, match=f"^batch {size} does not divide over 8 devices; the nearest .* is {nearest}.$"):
        check_batch(size, make_mesh(), "batch")
    check_batch(nearest, make_mesh(), "batch")


def test_rows_of_a_batch_go_to_the_devices_in_order():
    mesh = make_mesh(data=4)
    batch = to_devices({"image": np.arange(16).reshape(8, 2), "label": np.arange(8)}, mesh)
    assert batch["image"].sharding == split_batch(mesh)
    for i, device in enumerate(mesh.devices.flat):
        (shard,) = (s for s in batch["label"].addressable_shards if s.device == device)
        assert shard.data.tolist() == [2 * i, 2 * i + 1]
    np.testing.assert_array_equal(batch["image"], np.arange(16).reshape(8, 2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["averaged", "per_device"])
@pytest.mark.parametrize("accumulate", cases([1, 2], long=[1]))
def test_batch_norms_of_each_device_are_those_of_eight_separate_trainers(mode, accumulate):
    """Three steps against eight copies of the network that share gradients only, as PyTorch's do."""
    steps, rate = 3, 0.1
    model, optimizer = Tiny(3, constant=False), optax.sgd(rate)
    first = start(model, optimizer)

    def scale(key, images, labels):
        del key
        return images.astype(jnp.float64) / 255, jax.nn.one_hot(labels, 3, dtype=jnp.float64)

    mesh = make_mesh()
    step = make_train_step(
        model, optimizer, total_loss, scale, mesh=mesh, dtype=jnp.float64, accumulate=accumulate, batch_norm=mode
    )
    split = split_batch(mesh)
    step = jax.jit(step, in_shardings=(replicated(mesh), {"image": split, "label": split}, replicated(mesh)))

    @jax.jit
    def one(params, stats, images, labels):
        def objective(params):
            variables = {"params": params, "batch_stats": stats}
            outputs, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return total_loss(outputs, jax.nn.one_hot(labels, 3, dtype=jnp.float64))[0], new["batch_stats"]

        return jax.grad(objective, has_aux=True)(params)

    state, params = first, first.params
    chains = [first.model_state["batch_stats"]] * 8
    for batch in batches(steps):
        batch["image"] = batch["image"] // (1 + np.arange(16, dtype=np.uint8))[:, None, None, None]  # devices differ
        state, _ = step(state, to_devices(batch, mesh), jax.random.key(1))
        total = jax.tree.map(jnp.zeros_like, params)
        for micro in range(accumulate):
            images, labels = batch["image"][micro::accumulate] / 255, batch["label"][micro::accumulate]
            rows = len(labels) // 8
            for device in range(8):
                own = slice(device * rows, (device + 1) * rows)
                grads, chains[device] = one(params, chains[device], images[own], labels[own])
                total = jax.tree.map(lambda a, b: a + b / 8 / accumulate, total, grads)
        params = jax.tree.map(lambda p, g: p - rate * g, params, total)
    kept = chains[0] if mode == "per_device" else jax.tree.map(lambda *leaves: sum(leaves) / 8, *chains)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), state.params, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), state.model_state["batch_stats"], kept
    )
    assert not np.allclose(chains[0]["norm"]["mean"], chains[7]["norm"]["mean"], rtol=1e-3)


@pytest.mark.parametrize("column", [np.arange(3), np.array([True, False]), np.float32([[0.25, 1], [2, -3]])])
def test_what_processes_gather_keeps_its_type_and_shape(column, monkeypatch):
    """JAX sends neither 64 bits nor truths as they are."""

    def sent(rows, tiled):
        assert tiled and rows.dtype in (np.int32, np.float32)
        return jnp.concatenate([rows, rows])

    monkeypatch.setattr(sharding.jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", sent)
    gathered = sharding.gather_processes(column)
    assert gathered.dtype == column.dtype
    np.testing.assert_array_equal(gathered, np.concatenate([column, column]))
