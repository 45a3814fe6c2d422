"""MobileViT v1 and v2: exact sizes, timm's numbers in float64 with every weight random, initialisation, sentences."""

import pytest

from maxmap.backbones import mobilevit
from maxmap.errors import UserError
from maxmap.layers import blocks
from maxmap.models import create_model
from tests import zoo
from tests.reference import import_timm
from tests.zoo import named, numbers

# Parameters with 1000 classes, channels of the stem's and the stages' maps, and of the last convolution's in v1.
ROWS = {
    "mobilevit_xxs": (1_272_024, (16, 16, 24, 48, 64, 80, 320)),
    "mobilevit_xs": (2_317_848, (16, 32, 48, 64, 80, 96, 384)),
    "mobilevit_s": (5_578_632, (16, 32, 64, 96, 128, 160, 640)),
    "mobilevitv2_050": (1_370_593, (16, 32, 64, 128, 192, 256)),
    "mobilevitv2_075": (2_866_009, (24, 48, 96, 192, 288, 384)),
    "mobilevitv2_100": (4_901_841, (32, 64, 128, 256, 384, 512)),
    "mobilevitv2_125": (7_478_089, (40, 80, 160, 320, 480, 640)),
    "mobilevitv2_150": (10_594_753, (48, 96, 192, 384, 576, 768)),
    "mobilevitv2_175": (14_251_833, (56, 112, 224, 448, 672, 896)),
    "mobilevitv2_200": (18_449_329, (64, 128, 256, 512, 768, 1024)),
}
# Height and width cannot be mixed up unseen, and 2x2 patches divide the maps of no stage with transformers.
SIZE, CLASSES = (36, 52), 10
STEM, WIDTHS, HEAD = 8, (8, 8, 16), 24
DEPTHS, TRANSFORMERS, DIM = (1, 2, 1), (0, 1, 2), (0, 8, 16)
VERSIONS = {"mobilevit_s": {"head_width": HEAD, "expand": 2.0}, "mobilevitv2_100": {}}


def small(name, **fields):
    """Three narrow stages, the last two with transformers."""
    stages = {"embed_dim": WIDTHS, "depths": DEPTHS, "transformer_depths": TRANSFORMERS, "transformer_dim": DIM}
    return create_model(name, num_classes=CLASSES, stem_width=STEM, **VERSIONS[name], **stages, **fields)


def timm_model(name, **fields):
    import_timm()
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    v1 = name == "mobilevit_s"
    bottleneck = {"type": "bottle", "gs": 1, "br": 2.0, "block_kwargs": {"bottle_in": True, "linear_out": True}}
    stages = []
    for stage, (channels, depth, transformers, dim) in enumerate(zip(WIDTHS, DEPTHS, TRANSFORMERS, DIM, strict=True)):
        kwargs = {"transformer_dim": dim, "transformer_depth": transformers, "patch_size": 2}
        kind = {"type": "mobilevit"} if v1 else {"type": "mobilevit2", "gs": 1, "br": 0.5}
        parts = [ByoBlockCfg(d=depth, c=channels, s=2 if stage else 1, **bottleneck)]
        if transformers:
            parts.append(ByoBlockCfg(d=1, c=channels, s=1, block_kwargs=kwargs, **kind))
        stages.append(tuple(parts))
    config = ByoModelCfg(
        blocks=tuple(stages),
        stem_chs=STEM,
        stem_type="3x3",
        stem_pool="",
        downsample="",
        act_layer="silu",
        num_features=HEAD if v1 else 0,
    )
    return ByobNet(config, num_classes=CLASSES, **fields)


def test_every_variant_has_a_row():
    assert set(ROWS) == named("mobilevit")


@pytest.mark.parametrize(("name", "row"), ROWS.items())
def test_parameters_and_features(name, row, plain_convolutions):
    params, channels = row
    strides = (2, 2, 4, 8, 16, 32, 32)[: len(channels)]
    zoo.assert_size(create_model(name), params, zoo.pyramid(256, strides, channels))


# The last bias in front of 1x1 convolutions, behind which batch norms subtract their means.
SHIFTS = {
    "mobilevit_s": {"stages.0.0.conv3_1x1.bn.bias", "stages.1.2.norm.bias", "stages.2.1.norm.bias"},
    "mobilevitv2_100": {
        *("stages.0.0.conv3_1x1.bn.bias", "stages.1.2.conv_proj.bn.bias"),
        *("stages.1.2.norm.bias", "stages.2.1.norm.bias"),
    },
}


@pytest.mark.parametrize("name", VERSIONS)
def test_equals_timm(name, x64, plain_convolutions):
    options = {"exclude_final_conv": True} if name == "mobilevit_s" else {}
    x = numbers(0, 2, *SIZE, 3)
    zoo.assert_equals_timm(small(name), timm_model(name), x, slice(1, 4), idle=SHIFTS[name], **options)


@pytest.mark.parametrize("name", VERSIONS)
def test_initialisation_follows_timm(name, plain_convolutions):
    zoo.assert_initialised_like(small(name), SIZE, lambda: timm_model(name))


@pytest.mark.parametrize("name", VERSIONS)
def test_drop_path_rates_are_timms_where_there_is_a_residual(name, monkeypatch, plain_convolutions):
    """timm drops the output of blocks without a residual path too, which leaves a map of zeros."""
    rates = zoo.rates_of(small(name, drop_path=0.5), SIZE, monkeypatch, mobilevit, blocks)
    assert rates == pytest.approx([0, 0.2, *[0.3] * 2, *[0.5] * 4])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"depths": (1, 3, 1)}, "embed_dim, depths, transformer_depths and transformer_dim need one entry for each"),
        ({"heads": 5}, "5 heads do not divide 144 transformer channels of stage 2; the nearest that do is 4"),
        ({"transformer_depths": (0, 1, 2, 4, 3)}, "stage 1 has transformers, so transformer_dim cannot be 0 there"),
    ],
)
def test_bad_fields(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        create_model("mobilevit_s", **fields)
