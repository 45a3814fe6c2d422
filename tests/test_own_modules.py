"""Heads and backbones from outside of the package, and docs/own_modules.md, which shows them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import maxmap
from maxmap.config import read, schema
from maxmap.errors import UserError
from maxmap.features import feature_info
from maxmap.heads.map import MAPHead
from maxmap.models import create_model
from tests.test_features import BLOCK
from tests.tiny import ROOT


class Maps(nn.Module):
    """Three maps of 8, 4 and 2 pixels."""

    image_size: int = 16

    @nn.compact
    def __call__(self, x, *, train=False):
        maps = [nn.Conv(8, (3, 3), strides=2)(x)]
        maps.append(nn.Conv(8, (3, 3), strides=2)(maps[-1]))
        return [*maps, nn.Conv(16, (3, 3), strides=2)(maps[-1])]


class Single(nn.Module):
    """A map that is not in a list."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Conv(4, (1, 1))(x)


class Mean(nn.Module):
    """One branch; `returns` changes what it returns."""

    num_classes: int = 5
    returns: Any = staticmethod(lambda logits, mean: {"logits": logits[None], "embedding": mean})

    @nn.compact
    def __call__(self, features, *, train=False):
        mean = jnp.mean(features[-1], axis=(1, 2))
        return self.returns(nn.Dense(self.num_classes)(mean), mean)


IMAGES = jnp.linspace(-1, 1, 2 * 16 * 16 * 3).reshape(2, 16, 16, 3)


def test_own_modules_compute_what_they_compute_alone(quick_compilation):
    model = create_model(Maps(), head=Mean())
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]

    @jax.jit
    def alone(params):
        features = Maps().apply({"params": params["backbone"]}, IMAGES)
        return features, Mean().apply({"params": params["head"]}, features)

    @jax.jit
    def together(params):
        methods = (model.features, model.__call__, model.embed)
        return [model.apply({"params": params}, IMAGES, method=method) for method in methods]

    wanted, (features, outputs, embedding) = alone(params), together(params)
    for one, other in zip([*features, embedding], [*wanted[0], wanted[1]["embedding"]], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # float32, another program
    np.testing.assert_allclose(outputs["logits"], wanted[1]["logits"], rtol=1e-5, atol=1e-6)
    assert [(info.channels, info.stride) for info in feature_info(model)] == [(8, 2), (8, 4), (16, 8)]


def test_our_heads_on_an_own_backbone():
    """The linear one where none is named, with 1,000 classes."""
    assert create_model(Maps()).head == create_model(Maps(), head="linear", num_classes=1000).head
    model = create_model(Maps(), head={"name": "gramian", "channels": 32, "gram_channels": 32}, num_classes=3)
    shapes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES)[0])
    assert shapes["logits"].shape == (model.head.branches, 2, 3)


def test_an_own_head_has_a_named_backbone_with_its_fields():
    named = create_model("maxvit_mini_32", drop_path=0.3, image_size=64)
    own = create_model("maxvit_mini_32", head=Mean(), drop_path=0.3, image_size=64)
    assert own.backbone == named.backbone and own.head == Mean()


def returning(function):
    return Mean(returns=staticmethod(function))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: create_model("maxvit_mini_32", head=Mean(), num_classes=3), "give it to Mean itself"),
        (lambda: create_model("maxvit_mini_32", head=Mean), "give a value of type str or mapping or Module or None"),
        (
            lambda: create_model(Maps(), drop_path=0.1, image_size=32),
            "drop_path, image_size: .* give them to Maps itself",
        ),
        (lambda: create_model(Maps(), pad=True), "pad: these are fields of named backbones"),
        (lambda: create_model(Mean()), "the backbone Mean has no field image_size"),
        (lambda: create_model(Maps(), head="mapp"), "there is no head 'mapp'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(build, says):
    with pytest.raises(UserError, match=says):
        build()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (create_model(Maps(), head=returning(lambda logits, mean: logits)), "let it return {'logits': "),
        (create_model(Maps(), head=returning(lambda logits, mean: {"logits": logits})), "let it return {'logits': "),
        (create_model(Maps(), head=returning(lambda logits, mean: {"embedding": mean})), "let it return {'logits': "),
        (maxmap.Classifier(Single(), Mean()), "the backbone Single .* a list of maps"),
        (create_model(Maps(), head="map"), "level 3 is out of range: the backbone has 3 feature maps"),
    ],
    ids=["array", "rank", "none", "backbone", "level"],
)
def test_what_a_module_returns_is_checked(model, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def test_a_head_of_ours_alone_checks_the_maps():
    with pytest.raises(ValueError, match=r"the MAP head's level 3 is out of range: .* highest level is 2"):
        jax.eval_shape(MAPHead(num_classes=10).init, jax.random.key(0), [jnp.zeros((1, 8, 8, 4))] * 3)
    with pytest.raises(ValueError, match="the Gramian head needs 2 feature maps"):
        jax.eval_shape(maxmap.GramianHead(10).init, jax.random.key(0), [jnp.zeros((1, 8, 8, 4))])


def test_a_head_without_an_embedding():
    model = create_model(Maps(), head=returning(lambda logits, mean: {"logits": logits[None]}))
    with pytest.raises(UserError, match="the head Mean returns no 'embedding'"):
        jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), IMAGES, method="embed"))


def test_a_config_holds_no_module(tmp_path):
    text = (ROOT / "configs/quickstart.py").read_text()
    assert '"drop_path": 0.05' in text
    path = tmp_path / "own.py"
    path.write_text(text.replace('"drop_path": 0.05', '"head": __import__("flax").linen.Dense(3)'))
    with pytest.raises(
        UserError, match=r"(?s)config.model.head is Dense.* give a value of type str or mapping or None"
    ):
        read(path)
    assert "Module" not in str(schema({})["model.name"].type)


def test_the_document_runs(quick_compilation, small_mini):
    session: dict[str, Any] = {}
    blocks = [match["text"] for match in BLOCK.finditer((ROOT / "docs" / "own_modules.md").read_text("utf-8"))]
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/own_modules.md", "exec"), session)
    before, after = session["variables"]["params"], session["trained"]["params"]
    same = jax.tree.map(np.array_equal, before, after)
    frozen = {key: tree for key, tree in same["backbone"].items() if key in ("stem", "stages_0")}
    trained = {"head": same["head"], **{key: tree for key, tree in same["backbone"].items() if key not in frozen}}
    assert len(frozen) == 2 and all(jax.tree.leaves(frozen))
    assert not all(jax.tree.leaves(trained["head"])) and not all(jax.tree.leaves(trained["stages_1"]))
    np.testing.assert_allclose(np.sum(session["attention"], axis=-1), 1, rtol=1e-6)  # a softmax in float32
    assert session["attention"].shape == (4, 16)
    shapes = jax.eval_shape(session["own"].apply, session["own_variables"], jnp.zeros((1, 64, 64, 3)))
    assert shapes["logits"].shape == (2, 1, 10)
