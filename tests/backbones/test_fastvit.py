"""FastViT in both forms: exact sizes, timm's numbers in float64 with every weight random, fusing, initialisation."""

import jax
import numpy as np
import pytest

import maxmap
from maxmap.backbones import fastvit
from maxmap.convert.torch import from_torch, to_torch
from maxmap.errors import UserError
from maxmap.models import create_model
from tests import zoo
from tests.reference import import_timm
from tests.zoo import named, nchw, numbers

# Parameters with 1000 classes, as trained and fused; channels of the stem's, the stages' and the last map.
ROWS = {
    "fastvit_t8": (4_026_232, 3_996_040, (48, 48, 96, 192, 384, 768)),
    "fastvit_t12": (7_553_704, 7_508_840, (64, 64, 128, 256, 512, 1024)),
    "fastvit_s12": (9_473_576, 9_428_712, (64, 64, 128, 256, 512, 1024)),
    "fastvit_sa12": (11_580_968, 11_545_320, (64, 64, 128, 256, 512, 1024)),
    "fastvit_sa24": (21_554_216, 21_501_288, (64, 64, 128, 256, 512, 1024)),
    "fastvit_sa36": (31_527_464, 31_457_256, (64, 64, 128, 256, 512, 1024)),
    "fastvit_ma36": (44_068_004, 43_984_632, (76, 76, 152, 304, 608, 1216)),
}
SIZE, CLASSES = (32, 48), 10  # height and width cannot be mixed up unseen
WIDTHS, DEPTHS, MIXERS, HEAD = (16, 32), (1, 2), ("repmixer", "attention"), 64


def small(**fields):
    """A stage of each mixer."""
    stages = {"embed_dim": WIDTHS, "depths": DEPTHS, "mixers": MIXERS, "mlp_ratio": 2.0, "head_width": HEAD}
    return create_model("fastvit_sa12", num_classes=CLASSES, **stages, **fields)


def timm_model(**fields):
    import_timm()
    from timm.models.fastvit import FastVit, RepConditionalPosEnc

    return FastVit(
        layers=DEPTHS,
        embed_dims=WIDTHS,
        mlp_ratios=(2, 2),
        token_mixers=MIXERS,
        pos_embs=(None, RepConditionalPosEnc),
        downsamples=(False, True),
        se_downsamples=(False, False),
        num_classes=CLASSES,
        **fields,
    )


def test_every_variant_has_a_row():
    assert set(ROWS) == named("fastvit")


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_parameters_and_features(name, row, plain_convolutions):
    trained, fused, channels = row
    features = zoo.pyramid(256, (4, 4, 8, 16, 32, 32), channels)
    zoo.assert_size(create_model(name), trained, features)
    zoo.assert_size(create_model(name, fused=True), fused, features)


# Biases in front of a 1x1 convolution and a batch norm, which subtracts their means.
SHIFTS = {f"stages.1.downsample.proj.0.{size}_conv.bn.bias" for size in ("large", "small")}


def test_equals_timm(x64, plain_convolutions):
    zoo.assert_equals_timm(small(), timm_model(), numbers(0, 2, *SIZE, 3), slice(1, 3), idle=SHIFTS)


def test_fused_form_equals_timm(x64, plain_convolutions):
    zoo.assert_equals_timm(small(fused=True), timm_model(inference_mode=True), numbers(0, 2, *SIZE, 3), slice(1, 3))


def test_fusing_changes_no_output(x64, plain_convolutions):
    """The first time it gives timm's weights, those of `reparameterize`; then it folds the norms that these have."""
    reference, weights = zoo.randomised(timm_model())
    model, x = small(), numbers(0, 2, *SIZE, 3)
    variables = from_torch(weights, model)
    fused, fused_variables = maxmap.fuse(model, variables)
    assert fused == small(fused=True)
    folded = maxmap.fuse(fused, fused_variables)[1]
    assert list(folded["batch_stats"]["backbone"]["stages_1"]["blocks_0"]) == ["norm"]  # behind a residual sum
    wanted, *both = (
        zoo.quick(lambda v, x, m=m: m.apply(v, x, method=zoo.run), v, x)
        for m, v in ((model, variables), (fused, fused_variables), (fused, folded))
    )
    for ours in both:
        jax.tree.map(lambda a, b: zoo.assert_close(a, b, 1e-12), ours, wanted)
    for module in reference.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    theirs = {key: value for key, value in reference.state_dict().items() if not key.endswith("num_batches_tracked")}
    mine = to_torch(fused_variables, fused)
    assert set(mine) == set(theirs)
    assert all(zoo.error(mine[key], value) < 1e-12 for key, value in theirs.items())
    zoo.assert_close(reference(nchw(x)).detach(), ours[1]["logits"][0], 1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_initialisation_follows_timm(fused, plain_convolutions):
    zoo.assert_initialised_like(small(fused=fused), SIZE, lambda: timm_model(inference_mode=fused))


def test_drop_path_rates_equal_timm(monkeypatch, plain_convolutions):
    rates = zoo.rates_of(small(drop_path=0.4), SIZE, monkeypatch, fastvit)
    zoo.assert_rates_equal_timm(rates, timm_model(drop_path_rate=0.4))
    assert np.allclose(rates, [0, 0.2, 0.2, 0.4, 0.4])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depths": (2, 2, 4)}, "embed_dim, depths and mixers need one entry for each stage"),
        ({"mixers": ("repmixer",) * 3 + ("attn",)}, "the mixer of stage 3 'attn' is not one of repmixer, attention"),
        ({"embed_dim": (48, 96, 200, 384)}, "200 channels of stage 2 are not a multiple of 96; the nearest is 192"),
        (
            {"embed_dim": (50, 100, 200, 400), "mixers": ("repmixer",) * 3 + ("attention",)},
            "400 channels of stage 3 are not a multiple of 32; the nearest is 384",
        ),
        ({"head_width": 700}, "700 channels of the last convolution are not a multiple of 384; the nearest is 768"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("fastvit_t8", **fields)
