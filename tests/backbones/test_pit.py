"""PiT: exact sizes, MAP's numbers for the network without a class token, timm's for the one with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.convert.torch import from_torch
from maxmap.errors import UserError
from maxmap.layers.primitives import drop_path_rates
from maxmap.models import create_model
from tests.reference import fill_state_dict, import_timm
from tests.zoo import (
    assert_drops_in_training_only,
    assert_equals_timm,
    assert_initialised_like,
    assert_size,
    named,
    quick,
    run,
)

# Parameters with 1000 classes, shapes of the feature maps.
MAPS = [(1, 27, 27, 144), (1, 27, 27, 144), (1, 14, 14, 288), (1, 7, 7, 576)]
ROWS = {
    "pit_s": (23_252_392, MAPS),
    "pit_s_224": (23_461_912, [*MAPS, (1, 1, 1, 576)]),
    "map_pit_s": (36_147_424, MAPS),
}

SIZE = (40, 56)  # maps of 9 x 13, 5 x 7 and 3 x 4
DEPTHS = (1, 2, 1)
HEADS = (1, 2, 4)


def shrunken(width=8, **fields):
    dims = tuple(width * heads for heads in HEADS)
    cut = {"image_size": SIZE, "patch_size": 8, "stride": 4, "embed_dim": dims, "depths": DEPTHS, "heads": HEADS}
    return create_model("pit_s_224", num_classes=10, **cut | fields)


@pytest.fixture(scope="module")
def timm_model():
    """timm's model of the same cut: rebuilt for every test that asks, by calling it."""
    import_timm()
    from timm.models.pit import PoolingVisionTransformer

    return lambda width=8: PoolingVisionTransformer(
        img_size=SIZE, patch_size=8, stride=4, base_dims=[width] * 3, depth=list(DEPTHS), heads=HEADS, num_classes=10
    )


def images():
    return np.random.default_rng(0).standard_normal((2, *SIZE, 3))


def largest_error(ours, theirs, scale):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / scale


def test_every_variant_has_a_row():
    assert set(ROWS) == named("pit")


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_features(name):
    assert_size(create_model(name), *ROWS[name])


@pytest.mark.long
def test_goldens(goldens, x64):
    """MAP's `pit_s` and `map_pit_s`, whose backbones have the same weights, branch by branch."""

    def state_dict(name):
        manifest = json.loads((goldens / f"{name}.json").read_text())
        return {key: value.astype(np.float64) for key, value in fill_state_dict(manifest["state_dict"]).items()}

    names = ("pit_s", "map_pit_s")
    plain, mapped = (create_model(name) for name in names)
    light = create_model("map_pit_s", head={"light": True})  # predicts with the self-distillation classifiers
    variables, with_map = (
        from_torch(state_dict(name), model) for name, model in zip(names, (plain, mapped), strict=True)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(with_map["params"])) == ROWS["map_pit_s"][0]

    def outputs(variables, with_map, x):
        features, linear = plain.apply(variables, x, method=run)
        logits, distill = (
            model.apply(with_map, features, method=lambda model, features: model.head(features))["logits"]
            for model in (mapped, light)
        )
        return features, linear["logits"][0], logits, distill

    x = np.random.RandomState(0).standard_normal((2, 3, 224, 224)).astype(np.float32).transpose(0, 2, 3, 1)
    x = x[:1].astype(np.float64)  # the second image would show nothing more
    features, *branches = quick(outputs, variables, with_map, x)
    with np.load(goldens / "pit_s.npz") as first, np.load(goldens / "map_pit_s.npz") as second:
        for i, feature in enumerate(features):
            wanted = first[f"feature_{i}_f64"][:1]
            assert largest_error(feature.mean((1, 2)), wanted, np.abs(wanted).max()) < 1e-9
        of_map = [second[f"{name}_logits_f64"][:, :1] for name in ("head", "distill")]
        wanted = first["logits_f64"][:1], *of_map
    for ours, theirs in zip(branches, wanted, strict=True):
        assert largest_error(ours, theirs, theirs.std()) < 1e-9


def test_equals_timm(timm_model, x64):
    assert_equals_timm(shrunken(), timm_model(), images(), slice(1, 4), embedding=False)


def test_initialisation_follows_timm(timm_model):
    assert_initialised_like(shrunken(32), SIZE, lambda: timm_model(32))


def test_drop_path_schedules():
    """timm's last block has the whole rate; MAP's stops one step short."""
    np.testing.assert_allclose(drop_path_rates(0.3, 4), [0, 0.1, 0.2, 0.3])
    np.testing.assert_allclose(drop_path_rates(0.4, 4, endpoint=False), [0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("field", ["drop_path", "attn_drop", "proj_drop"])
def test_rates_reach_the_blocks(field):
    assert_drops_in_training_only(shrunken(**{field: 0.5}), SIZE)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": (3, 5, 12)}, "5 heads do not divide 288 channels; the nearest that do is 4"),
        ({"depths": (2, 6)}, "embed_dim, depths and heads need one entry for each stage"),
        ({"embed_dim": (144, 300, 600)}, "144 channels do not divide 300; the nearest that they divide is 288"),
        ({"image_size": 12}, "image height 12 is smaller than a patch; the nearest size that works is 16"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("pit_s", **fields)


def test_images_of_another_size():
    with pytest.raises(ValueError, match="the images are 40 x 40 pixels, the position table is for 40 x 56"):
        jax.eval_shape(shrunken().init, jax.random.key(0), jnp.zeros((1, 40, 40, 3)))
