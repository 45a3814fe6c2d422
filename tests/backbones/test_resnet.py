"""ResNet-50 and MAP's form of it: exact sizes, timm's and the authors' numbers in float64 with every weight random."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.backbones import resnet
from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests import zoo
from tests.reference import import_timm, read_golden
from tests.zoo import error, initial_values, named, numbers, quick

# Parameters with 1000 classes, channels of the stem's and the stages' maps.
ROWS = {
    "resnet50": (25_557_032, (64, 256, 512, 1024, 2048)),
    "resnet50_se_deep": (15_385_608, (64, 256, 512, 1024, 1024)),
    "map_resnet50": (42_708_288, (64, 256, 512, 1024, 1024)),
}
SIZE, CLASSES = (64, 96), 10  # height and width cannot be mixed up unseen
WIDTHS, DEPTHS = (64, 128, 128, 256), (2, 1, 1, 1)
# MAP's network with everything narrow.
SMALL = {
    "embed_dim": (64, 64, 128, 128),
    "depths": DEPTHS,
    "num_classes": CLASSES,
    "head": {"channels": 48, "gram_channels": 32, "gram_groups": 8, "branches": 2, "heads": 3},
}


def timm_model(**fields):
    import_timm()
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, DEPTHS, num_classes=CLASSES, channels=[width // 4 for width in WIDTHS], **fields)


def small_resnet50(**fields):
    return create_model("resnet50", embed_dim=WIDTHS, depths=DEPTHS, num_classes=CLASSES, **fields)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("resnet")


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_parameters_and_features(name, row, plain_convolutions):
    params, channels = row
    zoo.assert_size(create_model(name), params, zoo.pyramid(224, (2, 4, 8, 16, 32), channels))


@pytest.mark.long
def test_golden(goldens, x64):
    """The published network, branch by branch; its light mode shows the self-distillation classifiers."""
    weights, images, wanted = read_golden(goldens, "map_resnet50")
    model = create_model("map_resnet50")
    light = create_model("map_resnet50", head={"light": True})
    variables = from_torch(weights, model)

    def outputs(variables, images):
        features = model.apply(variables, images, method="features")
        head = {collection: leaves["head"] for collection, leaves in variables.items()}
        return features, model.head.apply(head, features)["logits"], light.head.apply(head, features)["logits"]

    features, logits, distill = quick(outputs, variables, images[:1])  # the second image would show nothing more
    wanted = {key: value[:, :1] if key.endswith("logits") else value[:1] for key, value in wanted.items()}
    assert logits.shape == wanted["head_logits"].shape
    assert np.abs(logits - wanted["head_logits"]).max() < 1e-9 * wanted["head_logits"].std()
    assert np.abs(distill - wanted["distill_logits"]).max() < 1e-9 * wanted["distill_logits"].std()
    for i, feature in enumerate(features):
        assert error(feature.mean((1, 2)), wanted[f"feature_{i}"]) < 1e-9
    zoo.assert_same_names(variables, model, weights)


def test_equals_timm(x64, plain_convolutions):
    zoo.assert_equals_timm(small_resnet50(), timm_model(), numbers(0, 3, *SIZE, 3), slice(None))


def test_initialisation_follows_timm(plain_convolutions):
    zoo.assert_initialised_like(small_resnet50(), SIZE, timm_model)


def test_initialisation_of_map(plain_convolutions):
    """Convolutions by He's rule over fan_out, linear maps 0.02 wide, the last norm of every block zero."""
    model = create_model("map_resnet50", **SMALL)
    variables = initial_values(model, jnp.zeros((1, *SIZE, 3)))
    leaves = to_torch({"params": variables["params"]}, model)
    for key, value in leaves.items():
        weight = leaves[re.sub(r"bias$", "weight", key)]
        if weight.ndim == 1:
            start = float(key.endswith("weight") and not re.search(r"\.conv3\.1\.", key))
            assert (value == start).all(), key
        elif key.endswith("bias") and weight.ndim == 4:  # the reference leaves these to torch
            assert 0 < np.abs(value).max() <= np.prod(weight.shape[1:]) ** -0.5, key
        elif key.endswith("bias"):
            assert (value == 0).all(), key
        else:
            fan_out = value.shape[0] * np.prod(value.shape[2:])
            std = (2 / fan_out) ** 0.5 if value.ndim == 4 else 0.02
            assert value.std() == pytest.approx(std, rel=5 / value.size**0.5), key
            assert value.mean() == pytest.approx(0, abs=5 * std / value.size**0.5), key


@pytest.mark.long
def test_gradients_of_map(x64, plain_convolutions):
    """They reach every parameter but the biases that a softmax cancels."""
    cancelled = {f"head.mmcap.mmcap.{g}.attention.0.attn.{name}.bias" for g in range(2) for name in ("k", "w1")}
    assert zoo.idle_parameters(create_model("map_resnet50", **SMALL), SIZE, batch=4) == cancelled


def test_drop_path_rates_equal_timm(monkeypatch, plain_convolutions):
    rates = zoo.rates_of(small_resnet50(drop_path=0.4), SIZE, monkeypatch, resnet)
    zoo.assert_rates_equal_timm(rates, timm_model(drop_path_rate=0.4))
    assert rates[-1] == pytest.approx(0.4)


def test_drop_path_rates_of_map(monkeypatch, plain_convolutions):
    """i / N of the rate: the last block gets less than all of it."""
    rates = zoo.rates_of(create_model("map_resnet50", drop_path=0.1, **SMALL), SIZE, monkeypatch, resnet)
    assert rates == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("resnet50", {"embed_dim": (256, 513, 1024, 2048)}, "embed_dim 513 is not a multiple of 4; .* is 512"),
        ("map_resnet50", {"embed_dim": (256, 530, 1024, 1024)}, "embed_dim 530 is not a multiple of 16; .* is 528"),
        ("resnet50", {"depths": (3, 4, 6)}, "one entry for each stage"),
        ("map_resnet50", {"head": {"level": 5}}, "level 5 is out of range: .* the highest level is 4"),
    ],
)
def test_bad_fields(name, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model(name, **fields)
