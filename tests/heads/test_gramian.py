"""The Gramian head: exact sizes, the authors' numbers in float64 with every weight random, and its parts alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.convert.torch import from_torch, to_torch
from maxmap.cost import cost
from maxmap.errors import UserError
from maxmap.heads import gramian
from maxmap.heads.gramian import GramianHead, concatenate_features
from maxmap.layers import blocks
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.marks import cases
from tests.reference import read_golden
from tests.zoo import assert_same_names, error, idle_parameters, initial_values, named, numbers, quick, rates_of, run

# Parameters with 1000 classes, taps inside of the third stage.
ROWS = {
    "ga_convnext_tiny_688": (47_821_324, 2),
    "ga_convnext_tiny_768": (54_354_584, 2),
    "ga_convnext_small_688": (70_116_364, 4),
    "ga_convnext_small_768": (76_726_424, 4),
    "ga_convnext_base_976": (123_688_396, 4),
    "ga_convnext_base_1024": (128_839_176, 4),
    "ga_cswin_tiny": (43_431_816, 4),
    "ga_cswin_small": (55_754_568, 4),
    "ga_cswin_tiny_p42": (41_990_024, 5),
    "ga_cswin_small_p54": (54_312_776, 5),
    # Published as 41.3M and 27.7M, without code.
    "ga_resnet50": (41_273_252, 0),
    "ga_vit_small": (27_741_128, 0),
}
SIZE, CLASSES = (64, 96), 10  # height and width cannot be mixed up unseen
NARROW = {"channels": 64, "gram_channels": 32, "attention_width": None, "branches": 2}
SMALL = {
    "ga_convnext_tiny_688": {
        "embed_dim": (16, 24, 32, 48),
        "depths": (1, 1, 2, 1),
        "taps": 1,
        "head": NARROW,
    },
    "ga_cswin_tiny_p42": {
        "embed_dim": (16, 24, 32, 48),
        "heads": (2, 2, 4, 3),
        "depths": (1, 1, 2, 1),
        "taps": 1,
        "head": NARROW | {"gram_channels": 64},
    },
}


def small(name, **head):
    """The model of a name with everything narrow."""
    fields = SMALL[name]
    return create_model(name, image_size=SIZE, num_classes=CLASSES, **fields | {"head": fields["head"] | head})


def test_every_model_has_a_row():
    assert set(ROWS) == named("", "gramian")


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_outputs(name, plain_convolutions):
    params, taps = ROWS[name]
    model = create_model(name)
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    (features, outputs), variables = eval_shape_of_init(
        lambda x: model.init_with_output(jax.random.key(0), x, method=run), x
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == params
    assert len(features) == model.backbone.num_features() == 5 + taps
    assert outputs["logits"].shape == (5, 2, 1000)
    assert outputs["embedding"].shape == (2, 5 * model.head.channels)


@pytest.mark.parametrize("name, one, five", [("ga_resnet50", 22.4, 41.3), ("ga_vit_small", 22.9, 27.7)])
def test_parameters_of_the_papers_figure(name, one, five, plain_convolutions):
    """In millions, with one branch and with five: of the networks without released code."""
    for branches, millions in ((1, one), (5, five)):
        assert round(cost(create_model(name, head={"branches": branches}))[0] / 1e6, 1) == millions


def test_without_aggregation_the_last_map_is_read(x64):
    """The maps before it change nothing, and it has to have the head's channels."""
    head = GramianHead(num_classes=3, branches=2, aggregation="none", **dict(channels=64, gram_channels=16, heads=4))
    first, last = numbers(0, 2, 6, 4, 8), numbers(1, 2, 3, 5, 64)
    shapes = eval_shape_of_init(head.init, jax.random.key(0), [first, last])
    variables = jax.tree.map(lambda leaf: np.abs(numbers(leaf.size, *leaf.shape)), shapes)
    logits, again = quick(
        lambda *maps: [head.apply(variables, [x, last])["logits"] for x in maps], first, first[:, ::2] + 1
    )
    assert error(logits, again) < 1e-12
    assert {name.rstrip("_01") for name in variables["params"]} == {
        *("gram_contraction", "gram_layer", "gram_embedding", "ga", "fc")
    }
    with pytest.raises(ValueError, match="the last map, which has 8 channels, not 64; set channels"):
        jax.eval_shape(head.init, jax.random.key(0), [last, first])


@pytest.mark.parametrize("name", cases(SMALL, long=["ga_cswin_tiny_p42"]))
def test_golden(name, goldens, x64, plain_convolutions):
    """Branch by branch; the features are the stem's, the stages' and the aggregated map."""
    weights, images, wanted = read_golden(goldens, name)
    model = create_model(name)
    variables = from_torch(weights, model)
    aggregated = "stages_4" if "convnext" in name else "stage5_2"

    def apply(variables, images):
        (features, outputs), captured = model.apply(
            variables,
            images,
            method=run,
            capture_intermediates=lambda module, _: module.name == aggregated,
            mutable=["intermediates"],
        )
        (head,) = captured["intermediates"].values()  # which also sows its attention
        return [*features, *head[aggregated]["__call__"]], outputs

    maps, outputs = quick(apply, variables, images[:1])  # the second image would show nothing more
    taps = ROWS[name][1]
    maps = [*maps[:3], *maps[3 + taps :]]
    scale = wanted["head_logits"].mean(0).std()
    assert np.abs(outputs["logits"] - wanted["head_logits"][:, :1]).max() < 1e-9 * scale
    assert len(maps) == 6
    for i, feature in enumerate(maps):
        assert error(feature.mean((1, 2)), wanted[f"feature_{i}"][:1]) < 1e-9
    assert_same_names(variables, model, weights)


def test_features_are_concatenated_at_one_size(x64):
    """All maps but the stem's in order, averaged or enlarged to the last but one's size."""
    stem, large = numbers(0, 2, 8, 12, 1), numbers(1, 2, 8, 12, 2)
    tap, middle, small = numbers(2, 2, 4, 6, 3), numbers(3, 2, 4, 6, 4), numbers(4, 2, 2, 3, 5)
    x = concatenate_features([jnp.asarray(feature) for feature in (stem, large, tap, middle, small)])
    halved = large.reshape(2, 4, 2, 6, 2, 2).mean((2, 4))

    def doubled(x):
        """Twice the rows, half-pixel centres: a quarter of the neighbour, the edge repeated."""
        before, after = np.concatenate([x[:, :1], x[:, :-1]], 1), np.concatenate([x[:, 1:], x[:, -1:]], 1)
        return np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], 2).reshape(2, -1, *x.shape[2:])

    enlarged = doubled(doubled(small).swapaxes(1, 2)).swapaxes(1, 2)
    assert error(x, np.concatenate([halved, tap, middle, enlarged], axis=-1)) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_gradients(name, x64, plain_convolutions):
    """They reach every parameter but the biases that a batch norm takes out again."""
    cancelled = {f"gram_{part}.{k}.0.bias" for part in ("contraction", "embedding") for k in range(2)}
    if "convnext" in name:
        # The last block's bias shifts a map that is enlarged and goes into convolutions with batch norms behind.
        cancelled |= {"stages.4.downsample.0.bias", "stages.3.blocks.0.mlp.fc2.bias"}
    assert idle_parameters(small(name), SIZE, batch=4) == cancelled


@pytest.mark.parametrize("name", SMALL)
def test_initialisation(name, plain_convolutions):
    """GA-ConvNeXt: everything 0.02 wide. GA-CSWin: convolutions by torch's default."""
    model = small(name, branches=1)
    features = [jnp.zeros((1, 4, 6, 24))] * 3
    variables = initial_values(model.head, features)
    leaves = to_torch({"params": {"head": variables["params"]}}, model)
    for key, value in leaves.items():
        weight = leaves[re.sub(r"bias$", "weight", key)]
        if "cswin" in name and weight.ndim == 4:
            bound = np.prod(weight.shape[1:]) ** -0.5
            assert 0.5 * bound < np.abs(value).max() <= bound, key
        elif value.ndim > 1:
            assert value.std() == pytest.approx(0.02, rel=5 / value.size**0.5), key
        elif "gamma" in key:
            assert np.allclose(value, 1e-6 if key.endswith("gamma") else 1e-4), key
        else:
            assert (value == (key.endswith("weight") and weight.ndim == 1)).all(), key


def test_drop_path(monkeypatch, plain_convolutions):
    """The recipe's rate: rising over the backbone, in full in the aggregation and in both branches' blocks."""
    model = small("ga_convnext_tiny_688", drop_path=0.4)
    model = model.clone(backbone=model.backbone.clone(drop_path=0.4))
    rates = rates_of(model, SIZE, monkeypatch, blocks, gramian)
    assert rates == pytest.approx([0.08 * i for i in range(5)] + [0.4] * 3)


@pytest.mark.parametrize(
    "name",
    [
        "maxvit_mini_32",
        "resnet50",
        "vit_small_patch16_224",
        "pit_s_224",
    ],
)
def test_any_backbone_at_its_own_size(name, plain_convolutions):
    """The default fields fit; the last map may be a class token, and stages may be few."""
    model = create_model(name, head={"name": "gramian", "branches": 1}, num_classes=CLASSES)
    size = model.backbone.image_size
    x = jnp.zeros((2, size, size, 3))
    outputs, _ = eval_shape_of_init(model.init_with_output, jax.random.key(0), x)
    assert outputs["logits"].shape == (1, 2, CLASSES)


def test_cswin_blocks_on_odd_maps(x64):
    """Stripes are half of the map; a side that cannot be halved is covered whole."""
    head = GramianHead(CLASSES, aggregation="cswin", block="cswin", **NARROW | {"gram_channels": 64})
    for size, branches in (((4, 6), 2), ((4, 7), 2), ((7, 7), 1)):
        features = [jnp.zeros((1, *size, 8))] * 3
        params = eval_shape_of_init(head.init, jax.random.key(0), features)["params"]
        assert len([key for key in params["stage5_2"] if key.startswith("attns")]) == branches


def test_without_classes(plain_convolutions):
    model = create_model("ga_convnext_tiny_688", num_classes=0, depths=(1, 1, 3, 1))
    outputs, variables = eval_shape_of_init(model.init_with_output, jax.random.key(0), jnp.zeros((2, 224, 224, 3)))
    assert outputs["logits"].shape == (5, 2, 688)
    assert outputs["embedding"].shape == (2, 3440)
    assert not any(name.startswith("fc") for name in variables["params"]["head"])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"embedding_groups": 9}, "9 embedding_groups do not divide 512 channels; the nearest that do is 8"),
        ({"contraction_groups": 5}, "5 contraction_groups do not divide 512 channels; the nearest that do is 4"),
        ({"heads": 7}, "7 heads do not divide 128 attention channels; the nearest that do is 8"),
        ({"mlp_groups": 3}, "3 mlp_groups do not divide 512 channels; the nearest that do is 2"),
        ({"gram_channels": 100}, "8 embedding_groups do not divide 5050 Gram values; the nearest that do is 10"),
        ({"block": "maxvit"}, "block 'maxvit' is not one of convnext, cswin"),
        ({"aggregation": "sum"}, "aggregation 'sum' is not one of bottleneck, cswin"),
        ({"init_scheme": "zeros"}, "init_scheme 'zeros' is not one of torch, trunc_normal"),
        (
            {"block": "cswin", "gram_channels": 160},
            "gram_channels 160 are not a multiple of 64, which a 'cswin' block needs; the nearest is 128",
        ),
        ({"layers": 2}, "no field 'layers'"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("convnext_tiny", head={"name": "gramian", **fields})
