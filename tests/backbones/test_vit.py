"""ViT: exact sizes, and timm's numbers in float64 with every weight random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxmap.convert.torch import from_torch
from maxmap.errors import UserError
from maxmap.layers.blocks import ViTBlock
from maxmap.models import create_model
from maxmap.shapes import eval_shape_of_init
from tests.reference import import_timm
from tests.zoo import (
    assert_drops_in_training_only,
    assert_equals_timm,
    assert_initialised_like,
    assert_size,
    named,
    nchw,
    quick,
    randomised,
    run,
)

# Parameters with 1000 classes, channels.
ROWS = {"vit_small_patch16_224": (22_050_664, 384), "vit_base_patch16_224": (86_567_656, 768)}

SIZE = (32, 48)
SMALL = {"image_size": SIZE, "patch_size": 8, "embed_dim": 24, "heads": 3, "depths": (1, 2, 1), "num_classes": 10}


@pytest.fixture(scope="module")
def timm_model():
    """timm's model of the same cut: rebuilt for every test that asks, by calling it."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return lambda **fields: VisionTransformer(
        **{"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 4, "num_classes": 10} | fields
    )


def images(channels=3):
    return np.random.default_rng(0).standard_normal((2, *SIZE, channels))


def test_every_variant_has_a_row():
    assert set(ROWS) == named("vit")


@pytest.mark.parametrize("name", ROWS)
def test_parameters_and_features(name):
    params, channels = ROWS[name]
    assert_size(create_model(name), params, [(1, 14, 14, channels)] * 5 + [(1, 1, 1, channels)])


@pytest.mark.parametrize("channels", [1, 3])
def test_equals_timm(channels, timm_model, x64):
    model = create_model("vit_small_patch16_224", **SMALL)
    reference = timm_model(in_chans=channels)
    assert_equals_timm(model, reference, images(channels), slice(1, 4), indices=[0, 2, 3], norm=False)


def test_without_class_token_equals_timm(timm_model, x64):
    import torch

    reference, weights = randomised(timm_model(class_token=False, global_pool="avg", fc_norm=False))
    model = create_model("vit_small_patch16_224", class_token=False, **SMALL)
    features, outputs = jax.jit(lambda v, x: model.apply(v, x, method=run))(from_torch(weights, model), images())
    with torch.no_grad():
        logits = reference(nchw(images())).numpy()
    assert len(features) == model.backbone.num_features() == 4
    assert np.abs(outputs["logits"][0] - logits).max() < 1e-9 * logits.std()


def test_initialisation_follows_timm(timm_model):
    model = create_model("vit_small_patch16_224", **SMALL | {"embed_dim": 96})
    assert_initialised_like(model, SIZE, lambda: timm_model(embed_dim=96))


def test_block_drops_in_training_only():
    """Each of the three rates; stochastic depth by whole images, the others by single values."""
    x = np.random.default_rng(0).standard_normal((64, 4, 8)).astype(np.float32)
    variables = quick(ViTBlock(2).init, jax.random.key(0), x)

    def outputs(variables, x, key):
        blocks = {field: ViTBlock(2, **{field: 0.5}) for field in ("drop_path", "attn_drop", "proj_drop")}
        return {
            (field, train): block.apply(variables, x, train=train, rngs={"dropout": key})
            for field, block in (blocks | {"none": ViTBlock(2)}).items()
            for train in (False, True)
        }

    outputs = quick(outputs, variables, x, jax.random.key(1))
    evaluated = outputs["none", False]
    np.testing.assert_allclose(outputs["none", True], evaluated, rtol=1e-5, atol=1e-6)
    for field in ("drop_path", "attn_drop", "proj_drop"):
        np.testing.assert_allclose(outputs[field, False], evaluated, rtol=1e-5, atol=1e-6)
        trained = outputs[field, True]
        untouched = np.all(np.asarray(trained == x), axis=(1, 2)).sum()
        assert 4 <= untouched <= 28 if field == "drop_path" else not untouched  # a quarter of 64 lose both branches
        assert np.abs(trained - evaluated).max() > 1e-3


@pytest.mark.parametrize("field", ["drop_path", "attn_drop", "proj_drop"])
def test_rates_reach_the_blocks(field):
    assert_drops_in_training_only(create_model("vit_small_patch16_224", **SMALL, **{field: 0.5}), SIZE)


def test_map_head_reads_the_patch_tokens_and_the_class_token():
    model = create_model("vit_small_patch16_224", head={"name": "map", "level": 3})
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    outputs, variables = eval_shape_of_init(lambda x: model.init_with_output(jax.random.key(0), x), x)
    assert outputs["logits"].shape == (4, 1, 1000)
    fusion = variables["params"]["head"]["mmcap"]["multi_scale"]["concat_conv_0"]["kernel"]
    assert fusion.shape == (1, 1, 6 * 384, 384)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"heads": 7}, "7 heads do not divide 384 channels; the nearest that do is 6"),
        ({"image_size": (224, 230)}, "image width 230 is not a multiple of the patch size 16; .* works is 224"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("vit_small_patch16_224", **fields)


def test_images_of_another_size():
    model = create_model("vit_small_patch16_224", **SMALL)
    with pytest.raises(ValueError, match="the images are 32 x 32 pixels, the position table is for 32 x 48"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
