"""Training of map_mobilenet_v1 in float64 against the reference: one step's gradients, then six optimizer steps.

tests/goldens/step_map_mobilenet_v1_96_b8.npz and trajectory_map_mobilenet_v1.npz hold, for every tensor by its name,
the norm ('l2'), the sum and the product with a random tensor ('dot_probe') that PyTorch, the reference's model and
loss, and timm's optimizers arrived at. All dropout is off.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxmap.convert.torch import from_torch, to_torch
from maxmap.losses import total_loss
from maxmap.models import create_model
from maxmap.optim import decay_mask, make_optimizer
from maxmap.train.step import _average
from tests.reference import fill_state_dict, read_manifest
from tests.zoo import QUICK

# What another order of the same sums changes, step by step, by the reference's own measurement: the losses, then the
# parameters. A hundred times as much is still the same computation; ReLU and the first steps, which are nearly signs,
# multiply rounding by about ten with every step.
CHAOS = {
    # The golden file's "a_lamb" is this one at a rate that makes rounding grow; "a3" and "a4" differ in its epsilon and
    # its clip, with which tests/test_optim.py compares it.
    "a2_lamb_lr5e-4": (
        (5e-15, 6e-13, 2e-14, 1e-12, 5e-13, 2e-12),
        (6e-13, 6e-13, 6e-13, 7e-13, 9e-13, 1e-12),
    ),
    "b_adamw": ((5e-15, 4e-12, 2e-10, 1e-9, 8e-10, 1e-8), (2e-11, 5e-11, 1e-10, 4e-10, 2e-9, 5e-9)),
    "c_lamb_clip_ema": ((1e-8,) * 6, (*(1e-8,) * 5, 1e-6)),  # torch adds 1e-6 to the norm by which it clips
}
LAMB = {"name": "lamb_timm", "learning_rate": 5e-3, "weight_decay": 0.02}
OPTIMIZERS = {
    "a2_lamb_lr5e-4": LAMB | {"learning_rate": 5e-4},
    "b_adamw": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05},
    "c_lamb_clip_ema": LAMB | {"clip_norm": 1.0},
}


@pytest.fixture(scope="module")
def problem(goldens):
    """The model, its first variables, and loss, outputs, new statistics and gradients of a batch."""
    model = create_model("map_mobilenet_v1", head={"attention_dropout": 0.0, "token_dropout": 0.0})
    weights = fill_state_dict(read_manifest(goldens, "map_mobilenet_v1")["state_dict"])
    with jax.enable_x64(True):
        variables = from_torch({key: value.astype(np.float64) for key, value in weights.items()}, model)

    def gradients(params, stats, images, targets):
        def objective(params):
            outputs, new = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
            )
            loss, _ = total_loss(outputs, targets, name="bce", decorrelation=-0.8)
            return loss, (outputs, new["batch_stats"])

        (loss, (outputs, stats)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return loss, outputs, stats, grads

    return model, variables, jax.jit(gradients, compiler_options=QUICK)


def batch(input_seed, target_seed):
    images = np.random.RandomState(input_seed).standard_normal((8, 3, 96, 96)).astype(np.float32)
    z = 3 * np.random.RandomState(target_seed).standard_normal((8, 1000))
    targets = np.exp(z - z.max(axis=1, keepdims=True))
    return images.transpose(0, 2, 3, 1).astype(np.float64), targets / targets.sum(axis=1, keepdims=True)


PROBES = {}


def probe(key, shape):
    if key not in PROBES:
        PROBES[key] = np.random.RandomState(zlib.crc32(f"probe:{key}".encode()) & 0x7FFFFFFF).standard_normal(shape)
    return PROBES[key]


def worst(named, keys, norms, products, floor=0.0):
    """The largest difference of norm or product over all tensors, relative to the norm (or `floor`), and its tensor."""
    assert set(named) == set(keys)
    errors = {}
    for key, norm, product in zip(keys, norms, products, strict=True):
        value = np.asarray(named[key], np.float64)
        v = probe(key, value.shape)
        difference = max(
            abs(np.linalg.norm(value) - norm), abs(np.sum(value * v) - product) / max(1, np.linalg.norm(v))
        )
        errors[key] = difference / max(norm, floor)
    return max((error, key) for key, error in errors.items())


@pytest.mark.long
def test_gradients_and_statistics_of_one_step(problem, goldens, x64):
    model, variables, gradients = problem
    loss, outputs, stats, grads = gradients(variables["params"], variables["batch_stats"], *batch(11, 12))
    with np.load(goldens / "step_map_mobilenet_v1_96_b8.npz") as golden:
        assert loss == pytest.approx(golden["loss"].item(), rel=1e-9)
        total = golden["global_grad_norm"].item()
        assert optax.tree.norm(grads) == pytest.approx(total, rel=1e-9)
        assert np.linalg.norm(outputs["logits"]) == pytest.approx(golden["head/l2"].item(), rel=1e-9)
        assert np.sum(outputs["logits"]) == pytest.approx(
            golden["head/sum"].item(), abs=1e-7 * golden["head/l2"].item()
        )

        # Two biases stand in front of a softmax: their gradients are rounding, in the reference as well.
        vanishing = {f"fc.mmcap.mmcap.0.attention.0.attn.{name}.bias" for name in ("k", "w1")}
        named, norms = (
            to_torch({"params": grads}, model),
            dict(zip(golden["grad/keys"], golden["grad/l2"], strict=True)),
        )
        for norms_of in (norms, {key: np.linalg.norm(value) for key, value in named.items()}):
            assert {key for key, norm in norms_of.items() if norm < 1e-9 * total} == vanishing
        error, key = worst(named, golden["grad/keys"], golden["grad/l2"], golden["grad/dot_probe"], floor=1e-6 * total)
        assert error < 1e-9, key
        error, key = worst(
            to_torch({"batch_stats": stats}, model), golden["bn/keys"], golden["bn/l2"], golden["bn/dot_probe"]
        )
        assert error < 1e-9, key


def test_decayed_parameters(problem, goldens):
    model, variables, _ = problem
    mask = decay_mask(variables["params"])
    named = to_torch({"params": mask}, model)
    with np.load(goldens / "trajectory_map_mobilenet_v1.npz") as golden:
        assert {key: bool(value) for key, value in named.items()} == dict(
            zip(golden["param_keys"].tolist(), golden["in_decay_group"].tolist(), strict=True)
        )


@pytest.mark.long
@pytest.mark.parametrize("variant", OPTIMIZERS)
def test_trajectory(variant, problem, goldens, x64):
    model, variables, gradients = problem
    params, stats = variables["params"], variables["batch_stats"]
    ema = variables
    optimizer = make_optimizer(**OPTIMIZERS[variant])
    state = optimizer.init(params)
    update = jax.jit(optimizer.update, compiler_options=QUICK)
    with np.load(goldens / "trajectory_map_mobilenet_v1.npz") as golden:
        for step, (loss_bound, bound) in enumerate(zip(*CHAOS[variant], strict=True)):
            loss, _, stats, grads = gradients(params, stats, *batch(100 + step, 200 + step))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            ema = _average(ema, {"params": params, "batch_stats": stats}, 0.9)

            wanted = {key: golden[f"{variant}/{key}"][step] for key in ("loss", "grad_norm", "param/l2", "bn/l2")}
            assert loss == pytest.approx(wanted["loss"], rel=100 * loss_bound), step
            products = {kind: golden[f"{variant}/{kind}/dot_probe"][step] for kind in ("param", "bn")}
            named = to_torch({"params": params}, model)
            error, key = worst(named, golden["param_keys"], wanted["param/l2"], products["param"])
            assert error < 100 * bound, (step, key)
            # The statistics are those of the forward pass, so of the parameters one step before.
            named = to_torch({"batch_stats": stats}, model)
            error, key = worst(named, golden["bn_keys"], wanted["bn/l2"], products["bn"])
            assert error < 100 * bound, (step, key)
        if variant == "c_lamb_clip_ema":
            for kind, collection in (("param", "params"), ("bn", "batch_stats")):
                named = to_torch({collection: ema[collection]}, model)
                stored = [golden[f"{variant}/ema_v2/{kind}/{what}"] for what in ("l2", "dot_probe")]
                error, key = worst(named, golden[f"{kind}_keys"], *stored)
                assert error < 1e-5, key
    assert jnp.result_type(loss) == np.float64
