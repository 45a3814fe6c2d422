"""The plan counts what the step does: the state byte by byte, the traffic as the compiled program sends it."""

import jax
import jax.numpy as jnp
import pytest

from maxmap.__main__ import main
from maxmap.config import bind
from maxmap.errors import UserError
from maxmap.models import create_model
from maxmap.optim import make_optimizer
from maxmap.shapes import eval_shape_of_init
from maxmap.sharding import make_mesh
from maxmap.train.plan import plan
from maxmap.train.state import abstract, create
from tests import shapes
from tests.tiny import ROOT, settings_for

QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def settings(**changes):
    values = settings_for(
        None, model={"name": "maxvit_mini_32", "num_classes": 10}, data__image_size=32, batch_size=32, mesh={}
    )
    for key, value in changes.items():
        values[key] = value
    return values


def test_the_state_is_counted_to_the_byte():
    values = settings(mesh={"data": 4, "fsdp": 2})
    found = plan(bind(values), 8, "tpu-v4", 0.3)
    optimizer = make_optimizer(1e-3, **values["optim"])
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = create_model("maxvit_mini_32", num_classes=10)
    like = eval_shape_of_init(lambda: create(model, optimizer, jax.random.key(0), images, ema=True))
    state = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract(like, make_mesh(data=4, fsdp=2))),
    )()

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    memory = found["memory"]
    assert memory["parameters"] == held(state.params)
    assert memory["optimizer"] == held(state.opt_state)
    assert memory["averages"] == held(state.ema)
    assert found["images_per_device"] == 4 and found["fits"]


def test_what_is_sent():
    # tests/test_sharding.py reads the same from the compiled step.
    one = plan(bind(settings()), 1, "tpu-v4", 0.3)
    whole, eight = 4 * one["parameters"], plan(bind(settings()), 8, "tpu-v4", 0.3)["sent"]
    assert sum(one["sent"].values()) == 0
    assert eight["gradients summed over data"] == pytest.approx(2 * whole * 7 / 8)
    assert eight["parameters gathered"] == 0
    split = plan(bind(settings(mesh={"fsdp": 2})), 2, "tpu-v4", 0.3)["sent"]
    assert split["gradients summed over data"] == 0
    assert 0.9 * whole / 2 < split["parameters gathered"] <= whole / 2
    kept = whole - 2 * split["parameters gathered"]
    assert split["gradients summed over fsdp"] == split["parameters gathered"] + kept  # 2 * 1 / 2 of what is not split
    # Every micro-batch sums its gradients.
    twice = plan(bind(settings(accumulate=2)), 8, "tpu-v4", 0.3)["sent"]
    assert twice["gradients summed over data"] == pytest.approx(2 * eight["gradients summed over data"])


def test_recomputation_is_less_memory_and_more_arithmetic():
    model = {"name": "maxvit_mini_32", "num_classes": 10}
    kept, again = (plan(bind(settings(model={**model, "remat": on})), 1, "tpu-v4", 0.3) for on in (False, True))
    assert again["memory"]["activations, at most"] < 0.5 * kept["memory"]["activations, at most"]
    assert again["flops"] == pytest.approx(4 / 3 * kept["flops"])


def test_the_logits_of_pixels_are_counted():
    """The loss keeps a probability of every class for every pixel."""
    few, many = (
        plan(bind(shapes.settings(None, batch_size=4, model__num_classes=count)), 1, "tpu-v4", 0.3)
        for count in (3, 203)
    )
    more = many["memory"]["activations, at most"] - few["memory"]["activations, at most"]
    assert more >= 200 * 4 * 32 * 32 * 4  # classes, images, pixels, bytes


def test_the_command(capsys):
    assert main(["plan", f"--config={QUICKSTART}", "--devices=4", "--hardware=tpu-v5e", "--config.mesh.fsdp=2"]) == 0
    said = capsys.readouterr().out
    assert "on 4 x tpu-v5e, mesh 2 x 2 (data x fsdp), 16 images" in said and "efficiency against one device" in said
    assert main(["plan", f"--config={QUICKSTART}", "--devices=256"]) == 2
    assert "does not divide over 256 devices" in capsys.readouterr().err
    assert main(["plan", f"--config={QUICKSTART}", "--devices=4", "--config.batch=3"]) == 2
    assert "no key 'batch'; the nearest are batch_size" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not make 6 devices"):
        plan(bind(settings(mesh={"fsdp": 4})), 6, "tpu-v4", 0.3)
