"""ConvNeXt: exact sizes, timm's and the authors' numbers in float64 with every weight random."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.backbones import convnext
from maxmap.convert.dialects import detect_naming
from maxmap.convert.torch import from_torch, to_torch
from maxmap.convert.wrappers import DERIVED
from maxmap.errors import UserError
from maxmap.layers import blocks
from maxmap.layers.blocks import tapped_blocks
from maxmap.losses import total_loss
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests import zoo
from tests.reference import fill_state_dict, import_timm, read_golden, read_manifest
from tests.zoo import initial_values, named, numbers, quick

# Parameters with 1000 classes, channels of the stem's and the stages' maps.
ROWS = {
    "convnext_tiny": (28_589_128, (96, 96, 192, 384, 768)),
    "convnext_small": (50_223_688, (96, 96, 192, 384, 768)),
    "convnext_base": (88_591_464, (128, 128, 256, 512, 1024)),
    "map_convnext_tiny": (47_833_760, (96, 96, 192, 384, 768)),
    "map_convnext_small": (82_837_664, (96, 96, 192, 384, 768)),
}
SIZE, CLASSES = (64, 96), 10  # height and width cannot be mixed up unseen
WIDTHS, DEPTHS = (16, 24, 32, 48), (1, 2, 3, 1)
SMALL = {"embed_dim": WIDTHS, "depths": DEPTHS, "num_classes": CLASSES}


def timm_model(**fields):
    import_timm()
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=CLASSES, **fields)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("convnext")


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_features(name, plain_convolutions):
    params, channels = ROWS[name]
    zoo.assert_size(create_model(name), params, zoo.pyramid(224, (4, 4, 8, 16, 32), channels))


@pytest.mark.long
def test_golden(goldens, x64, plain_convolutions):
    """The authors' network under their own names."""
    golden = read_golden(goldens, "convnext_tiny")
    model = create_model("convnext_tiny")
    variables = zoo.assert_equals_golden(model, golden)
    assert detect_naming(golden[0]).dialect == "fair"
    zoo.assert_same_names(variables, model, golden[0], "fair")


def summaries(key, value):
    """What the golden files keep of a tensor: norm, sum and the product with a random direction."""
    probe = np.random.RandomState(zlib.crc32(f"probe:{key}".encode()) & 0x7FFFFFFF).standard_normal(value.shape)
    return np.linalg.norm(value), value.sum(), (value * probe).sum(), np.linalg.norm(probe)


@pytest.mark.long
def test_training_step_of_map(goldens, x64):
    """Loss, gradient of every parameter and running statistics of the released network, under FAIR's names."""
    manifest = read_manifest(goldens, "map_convnext_tiny")
    weights = {key: value.astype(np.float64) for key, value in fill_state_dict(manifest["state_dict"]).items()}
    model = create_model("map_convnext_tiny", image_size=64, head={"attention_dropout": 0.0, "token_dropout": 0.0})
    variables = from_torch(weights, model)
    images = np.random.RandomState(11).standard_normal((4, 3, 64, 64)).astype(np.float32)
    images = images.astype(np.float64).transpose(0, 2, 3, 1)
    targets = jax.nn.softmax(3 * np.random.RandomState(12).standard_normal((4, 1000)))

    def loss(params):
        outputs, new = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return total_loss(outputs, targets, name="bce", decorrelation=-0.8)[0], new

    (value, new), gradient = quick(jax.value_and_grad(loss, has_aux=True), variables["params"])
    with np.load(goldens / "step_map_convnext_tiny_64_b4.npz") as arrays:
        golden = dict(arrays)
    assert float(value) == pytest.approx(float(golden["loss"]), rel=1e-9)
    grads, stats = (to_torch(tree, model, "lab-lvm") for tree in ({"params": gradient}, new))
    total = float(golden["global_grad_norm"])
    for group, leaves in (("grad", grads), ("bn", stats)):
        assert {key for key in leaves if not DERIVED.fullmatch(key)} == set(golden[f"{group}/keys"])
        for i, key in enumerate(golden[f"{group}/keys"]):
            l2, sum_, dot = (golden[f"{group}/{name}"][i] for name in ("l2", "sum", "dot_probe"))
            # Biases that a norm or a softmax takes out again have rounding for a gradient.
            scale = max(l2, 1e-3 * total) if group == "grad" else l2
            norm, ours_sum, ours_dot, probe = summaries(key, leaves[key])
            assert abs(norm - l2) < 1e-9 * scale, key
            assert abs(ours_sum - sum_) < 1e-9 * scale * probe, key
            assert abs(ours_dot - dot) < 1e-9 * scale * probe, key


def test_equals_timm(x64, plain_convolutions):
    model = create_model("convnext_tiny", **SMALL)
    zoo.assert_equals_timm(model, timm_model(), numbers(0, 3, *SIZE, 3), slice(1, None))


@pytest.mark.parametrize(
    ("depth", "taps", "blocks"),
    [(9, 2, [3, 6]), (27, 4, [5, 10, 15, 20]), (21, 5, [3, 6, 9, 12, 15]), (3, 2, [1, 2]), (9, 0, [])],
)
def test_tapped_blocks(depth, taps, blocks):
    assert tapped_blocks((3, 3, depth, 3), taps) == blocks


def test_taps_are_outputs_of_blocks_inside_of_the_third_stage(plain_convolutions):
    model = convnext.ConvNeXt(depths=(1, 1, 2, 1), embed_dim=WIDTHS, init_values=1.0, taps=1)

    def apply(key, x):
        return model.apply(
            {"params": model.init(key, x)["params"]},
            x,
            capture_intermediates=lambda module, _: module.path[:1] == ("stages_2",) and len(module.path) == 2,
            mutable=["intermediates"],
        )

    features, captured = quick(apply, jax.random.key(0), jnp.asarray(numbers(0, 1, *SIZE, 3), jnp.float32))
    assert len(features) == model.num_features() == 6
    for i in range(2):
        block = captured["intermediates"]["stages_2"][f"blocks_{i}"]["__call__"][0]
        assert np.array_equal(features[3 + i], block)


def test_initialisation_follows_timm(plain_convolutions):
    zoo.assert_initialised_like(create_model("convnext_tiny", **SMALL), SIZE, timm_model)


def test_initialisation_of_map(plain_convolutions):
    """Convolutions and linear maps 0.02 wide, their biases zero, in the head as in the backbone."""
    head = {"channels": 48, "gram_channels": 32, "gram_groups": 8, "branches": 2, "heads": 3}
    model = create_model("map_convnext_tiny", head=head, **SMALL)
    variables = initial_values(model, jnp.zeros((1, *SIZE, 3)))
    for key, value in to_torch({"params": variables["params"]}, model).items():
        if value.ndim > 1:
            assert value.std() == pytest.approx(0.02, rel=5 / value.size**0.5), key
            assert value.mean() == pytest.approx(0, abs=0.1 / value.size**0.5), key
        else:
            start = 1e-6 if key.endswith("gamma") else float(key.endswith("weight"))
            assert np.array_equal(value, np.full_like(value, start)), key


@pytest.mark.parametrize("endpoint", [True, False])
def test_drop_path_rates(endpoint, monkeypatch, plain_convolutions):
    """timm's; a network with a head that goes on dropping ends one step short."""
    model = convnext.ConvNeXt(depths=DEPTHS, embed_dim=WIDTHS, drop_path=0.42, drop_path_endpoint=endpoint)
    rates = zoo.rates_of(model, SIZE, monkeypatch, blocks)
    if endpoint:
        zoo.assert_rates_equal_timm(rates, timm_model(drop_path_rate=0.42))
    else:
        assert rates == pytest.approx([0.42 * i / 7 for i in range(7)])


def test_any_size_above_the_least(plain_convolutions):
    model = create_model("convnext_tiny", **SMALL)
    shapes = [
        f.shape[1:3]
        for f in eval_shape_of_init(model.backbone.init_with_output, jax.random.key(0), jnp.zeros((1, 75, 101, 3)))[0]
    ]
    assert shapes == [(18, 25), (18, 25), (9, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_size": 24}, "image side 24 is too small for 4 stages; the least is 32"),
        ({"depths": (3, 3, 9)}, "one entry for each stage"),
        ({"taps": 9}, "9 taps do not fit inside of a third stage of 9 blocks; the most is 8"),
        ({"head": {"name": "map", "level": 5}}, "level 5 is out of range: .* the highest level is 4"),
        ({"dropout": 0.1}, "no field 'dropout'; the nearest are drop_path"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("convnext_tiny", **fields)
