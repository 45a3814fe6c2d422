"""The maxxvit family's published models, as data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from maxmap.backbones import Variant
from maxmap.backbones.maxxvit.backbone import MaxxViT

_RW_CONV = {"expand_output": False, "output_bias": False, "activation": "silu"}
PRESETS: dict[str, dict[str, Any]] = {
    "plain": {"conv": {}, "transformer": {}},
    "rw_coat": {
        "conv": _RW_CONV | {"pre_norm_act": True, "stride_mode": "pool", "se_activation": "relu"},
        "transformer": {"expand_first": False},
    },
    "rw_max": {"conv": _RW_CONV | {"se_ratio": 0.0625}, "transformer": {"expand_first": False}},
    "next": {
        "conv_block": "convnext",
        "conv": {},
        "transformer": {"expand_first": False, "rel_pos_type": "mlp", "init_values": 1e-6},
    },
    "tf": {
        "conv": {"padding": "same", "activation": "gelu_tanh", "epsilon": 1e-3},
        "transformer": {"head_first": False, "rel_pos_type": "bias_tf", "activation": "gelu_tanh", "epsilon": 1e-5},
    },
}

_PICO, _NANO, _SMALL, _LARGE = (32, 64, 128, 256), (64, 128, 256, 512), (96, 192, 384, 768), (128, 256, 512, 1024)
_XLARGE = (192, 384, 768, 1536)
_M, _PM = ("M",) * 4, ("PM",) * 4


# The plain classifiers. Their hidden layer is a linear map and tanh.
_NORM_FIRST = {"norm": "before"}
_HIDDEN = {"norm": "after", "hidden_ratio": 1.0}
_TF_HIDDEN = _HIDDEN | {"epsilon": 1e-5}


def _config(
    preset: str,
    embed_dim: Sequence[int],
    depths: Sequence[int],
    classifier: Mapping[str, Any] = _NORM_FIRST,
    **fields: Any,
) -> Variant:
    """Returns a preset with differences; `conv` and `transformer` are merged field by field."""
    base = PRESETS[preset]
    merged = {key: base[key] | fields.pop(key, {}) for key in ("conv", "transformer")}
    return Variant(MaxxViT, classifier, {**base, "embed_dim": embed_dim, "depths": depths, **fields, **merged})


def _coat(preset: str, embed_dim: Sequence[int], depths: Sequence[int], **fields: Any) -> Variant:
    return _config(preset, embed_dim, depths, **({"stem_width": (embed_dim[0] // 3, embed_dim[0] // 3 * 2)} | fields))


def _max(preset: str, embed_dim: Sequence[int], depths: Sequence[int], **fields: Any) -> Variant:
    return _config(preset, embed_dim, depths, **({"stem_width": (32, 64), "block_types": _M} | fields))


def _tf(embed_dim: Sequence[int], depths: Sequence[int], stem_width: int) -> Variant:
    return _config("tf", embed_dim, depths, _TF_HIDDEN, block_types=_M, stem_width=stem_width, stem_bias=True)


def _sized(variant: Variant, size: int) -> Variant:
    return dataclasses.replace(variant, fields={"image_size": size, **variant.fields})


_MLP = {"rel_pos_type": "mlp"}
_DW = {"stride_mode": "dw"}
_DW_SILU = _DW | {"se_activation": "silu"}
_S32, _S64, _S96 = {"stem_width": (32, 64)}, {"stem_width": (64, 128)}, {"stem_width": (96, 192)}
_COAT_RMAX = {"output_bias": True, "se_ratio": 0.25}

# Every configuration, and the image sizes that its names end in.
CONFIGS: dict[str, tuple[Variant, tuple[int, ...]]] = {
    "coatnet_pico_rw": (_coat("rw_max", _NANO, (2, 3, 5, 2), conv=_COAT_RMAX, **_S32), (224,)),
    "coatnet_nano_rw": (
        _coat("rw_max", _NANO, (3, 4, 6, 3), conv=_COAT_RMAX | {"stride_mode": "pool"}, **_S32),
        (224,),
    ),
    "coatnet_0_rw": (
        _coat("rw_coat", _SMALL, (2, 3, 7, 2), conv={"se_early": True}, transformer={"shortcut_bias": False}),
        (224,),
    ),
    "coatnet_1_rw": (
        _coat("rw_coat", _SMALL, (2, 6, 14, 2), conv=_DW | {"se_early": True}, transformer={"shortcut_bias": False}),
        (224,),
    ),
    "coatnet_2_rw": (_coat("rw_coat", _LARGE, (2, 6, 14, 2), conv=_DW_SILU, **_S64), (224,)),
    "coatnet_3_rw": (
        _coat("rw_coat", _XLARGE, (2, 6, 14, 2), conv=_DW_SILU, transformer={"init_values": 1e-6}, **_S96),
        (224,),
    ),
    "coatnet_bn_0_rw": (
        _coat(
            "rw_coat",
            _SMALL,
            (2, 3, 7, 2),
            classifier={"norm": "before", "norm_type": "batch"},
            conv=_DW | {"se_early": True},
            transformer={"shortcut_bias": False, "norm": "batch"},
        ),
        (224,),
    ),
    "coatnet_rmlp_nano_rw": (
        _coat("rw_max", _NANO, (3, 4, 6, 3), conv=_COAT_RMAX, transformer=_MLP | {"rel_pos_dim": 384}, **_S32),
        (224,),
    ),
    "coatnet_rmlp_0_rw": (_coat("rw_coat", _SMALL, (2, 3, 7, 2), conv=_DW, transformer=_MLP), (224,)),
    "coatnet_rmlp_1_rw": (
        _coat(
            "rw_coat",
            _SMALL,
            (2, 6, 14, 2),
            conv={"pool_type": "max", "se_early": True},
            transformer=_MLP | {"shortcut_bias": False, "pool_type": "max", "rel_pos_dim": 384},
        ),
        (224,),
    ),
    "coatnet_rmlp_1_rw2": (_coat("rw_coat", _SMALL, (2, 6, 14, 2), conv=_DW, transformer=_MLP), (224,)),
    "coatnet_rmlp_2_rw": (
        _coat("rw_coat", _LARGE, (2, 6, 14, 2), conv=_DW_SILU, transformer=_MLP | {"init_values": 1e-6}, **_S64),
        (224, 384),
    ),
    "coatnet_rmlp_3_rw": (
        _coat("rw_coat", _XLARGE, (2, 6, 14, 2), conv=_DW_SILU, transformer=_MLP | {"init_values": 1e-6}, **_S96),
        (224,),
    ),
    "coatnet_nano_cc": (
        _coat("rw_coat", _NANO, (3, 4, 6, 3), block_types=("C", "C", ("C", "T"), ("C", "T")), **_S32),
        (224,),
    ),
    "coatnext_nano_rw": (
        _coat(
            "next",
            _NANO,
            (3, 4, 6, 3),
            init_scheme="normal",
            conv={"init_values": 1e-5},
            transformer={"rel_pos_type": "bias", "init_values": None},
            **_S32,
        ),
        (224,),
    ),
    "coatnet_0": (_config("plain", _SMALL, (2, 3, 5, 2), _HIDDEN), (224,)),
    "coatnet_1": (_config("plain", _SMALL, (2, 6, 14, 2), _HIDDEN), (224,)),
    "coatnet_2": (_config("plain", _LARGE, (2, 6, 14, 2), _HIDDEN, stem_width=128), (224,)),
    "coatnet_3": (_config("plain", _XLARGE, (2, 6, 14, 2), _HIDDEN, stem_width=192), (224,)),
    "coatnet_4": (_config("plain", _XLARGE, (2, 12, 28, 2), _HIDDEN, stem_width=192), (224,)),
    "coatnet_5": (_config("plain", (256, 512, 1280, 2048), (2, 12, 28, 2), _HIDDEN, stem_width=192), (224,)),
    "maxvit_pico_rw": (_max("rw_max", _PICO, (2, 2, 5, 2), stem_width=(24, 32)), (256,)),
    "maxvit_nano_rw": (_max("rw_max", _NANO, (1, 2, 3, 1)), (256,)),
    "maxvit_tiny_rw": (_max("rw_max", _NANO, (2, 2, 5, 2)), (224, 256)),
    "maxvit_tiny_pm": (_max("rw_max", _NANO, (2, 2, 5, 2), block_types=_PM), (256,)),
    "maxvit_rmlp_pico_rw": (
        _max("rw_max", _PICO, (2, 2, 5, 2), stem_width=(24, 32), transformer=_MLP),
        (256,),
    ),
    "maxvit_rmlp_nano_rw": (_max("rw_max", _NANO, (1, 2, 3, 1), transformer=_MLP), (256,)),
    "maxvit_rmlp_tiny_rw": (_max("rw_max", _NANO, (2, 2, 5, 2), transformer=_MLP), (256,)),
    "maxvit_rmlp_small_rw": (
        _max("rw_max", _SMALL, (2, 2, 5, 2), transformer=_MLP | {"init_values": 1e-6}),
        (224, 256),
    ),
    "maxvit_rmlp_base_rw": (_max("rw_max", _SMALL, (2, 6, 14, 2), classifier=_HIDDEN, transformer=_MLP), (224, 384)),
    "maxxvit_rmlp_nano_rw": (_max("next", _NANO, (1, 2, 3, 1), init_scheme="normal"), (256,)),
    "maxxvit_rmlp_tiny_rw": (_max("next", _NANO, (2, 2, 5, 2)), (256,)),
    "maxxvit_rmlp_small_rw": (_max("next", _SMALL, (2, 2, 5, 2), stem_width=(48, 96)), (256,)),
    "maxxvitv2_nano_rw": (
        _max(
            "next",
            _SMALL,
            (1, 2, 3, 1),
            stem_width=(48, 96),
            init_scheme="normal",
            block_attention=False,
            transformer={"rel_pos_type": "bias"},
        ),
        (256,),
    ),
    "maxxvitv2_rmlp_base_rw": (
        _max("next", _LARGE, (2, 6, 12, 2), stem_width=(64, 128), block_attention=False),
        (224, 384),
    ),
    "maxxvitv2_rmlp_large_rw": (
        _max(
            "next",
            (160, 320, 640, 1280),
            (2, 6, 16, 2),
            classifier=_HIDDEN,
            stem_width=(80, 160),
            block_attention=False,
        ),
        (224,),
    ),
    "maxvit_tiny_tf": (_tf(_NANO, (2, 2, 5, 2), 64), (224, 384, 512)),
    "maxvit_small_tf": (_tf(_SMALL, (2, 2, 5, 2), 64), (224, 384, 512)),
    "maxvit_base_tf": (_tf(_SMALL, (2, 6, 14, 2), 64), (224, 384, 512)),
    "maxvit_large_tf": (_tf(_LARGE, (2, 6, 14, 2), 128), (224, 384, 512)),
    "maxvit_xlarge_tf": (_tf(_XLARGE, (2, 6, 14, 2), 192), (224, 384, 512)),
}

VARIANTS = {f"{name}_{size}": _sized(variant, size) for name, (variant, sizes) in CONFIGS.items() for size in sizes} | {
    "test_maxvit": _sized(_max("rw_max", (32, 64, 96, 128), (1, 1, 1, 1), stem_width=(16, 32)), 160),
    "test_coatnet": _sized(
        _coat(
            "rw_max",
            (32, 64, 96, 128),
            (1, 1, 2, 1),
            conv=_COAT_RMAX | {"stride_mode": "pool"},
            stem_width=(16, 32),
        ),
        160,
    ),
    # torchvision's MaxViT-T, another graph than timm's and Google's.
    "maxvit_t": _sized(
        _config(
            "plain",
            _NANO,
            (2, 2, 5, 2),
            classifier=_TF_HIDDEN | {"bias": False},
            block_types=_M,
            stem_bias=(False, True),
            init_scheme="normal",
            conv={"pool_type": "avg3", "always_expand": True, "epsilon": 1e-3},
            transformer={"head_first": False, "scale_by_width": True, "epsilon": 1e-5},
        ),
        224,
    ),
    # Ours, for images of about 32 pixels (digits, CIFAR): two stages, maps of 8 and 4 pixels.
    "maxvit_mini_32": _sized(
        _config(
            "tf",
            (32, 96),
            (1, 2),
            classifier=_TF_HIDDEN,
            window_size=4,
            strides=(2, 2),
            block_types=("M", "M"),
            stem_width=(24, 32),
            stem_bias=True,
            transformer={"head_dim": 16},
        ),
        32,
    ),
}
