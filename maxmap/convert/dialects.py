"""Names of state-dict entries that do not follow the Flax path.

`CANONICAL` holds the exceptions in the canonical names: timm's for timm's families, else those of the paper's authors.
`DIALECTS` holds the names that other code bases give to the same networks. Both are short lists of rules, not tables of
all keys.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from maxmap.errors import UserError

# Exceptions by class of the head or of the backbone. Each pair turns a name made by rule (`head.` and the path) into
# the canonical one. The head's pairs come first, and of each list only the first pattern that matches is applied.
CANONICAL: dict[str, list[tuple[str, str]]] = {
    "CSWin": [(r"^head\.fc\.", "head.")],
    "EfficientViT": [(r"^head\.fc\.", "head.classifier.4.")],
    "EfficientViTLarge": [(r"^head\.fc\.", "head.classifier.4.")],
    "EfficientViTMSRA": [(r"^head\.norm\.", "head.bn."), (r"^head\.fc\.", "head.linear.")],
    "FasterViT": [(r"^head\.fc\.", "head.")],
    "FastViT": [(r"\.layer_scale\.([12])\.", r".layer_scale_\1.")],
    "FastViTSA": [(r"\.layer_scale\.([12])\.", r".layer_scale_\1.")],
    "GramianHead": [(r"^head\.", "")],
    "MAPHead": [(r"\.norm1\.([12])\.", r".norm1_\1.")],
    "MetaFormer": [(r"\.(act1?|res_scale[12])\.weight$", r".\1.scale")],
    "MobileNetV1": [(r"^head\.fc\.", "fc.2."), (r"^head\.", "fc.")],
    "PiT": [(r"^head\.fc\.", "head.")],
    "ResNet": [(r"^head\.fc\.", "fc.")],
    "SEResNet": [(r"^head\.fc\.", "head.")],
    "ViT": [(r"^head\.fc\.", "head.")],
}

# Second names of a tensor that a reference implementation stores twice: to the first name, and back.
ALIASES: list[tuple[str, str]] = [(r"\.to_global_feature\.pos\.", ".pos_embed.")]
SECOND_NAMES: list[tuple[str, str]] = [(r"\.global_tokenizer\.pos_embed\.", ".global_tokenizer.to_global_feature.pos.")]


@dataclass(frozen=True)
class Naming:
    """The names that a code base gives to the entries of a network.

    Attributes:
      dialect: name of the code base.
      marker: regular expression that matches a key of this naming and of no other.
      rules: pairs of prefixes, this naming's and the canonical one, with "*" for a number. Only the first pair that
        matches is applied.
      matrices: regular expression for the canonical keys of 1x1 convolutions that are stored as matrices.
    """

    dialect: str
    marker: str
    rules: tuple[tuple[str, str], ...]
    matrices: str = "(?!)"

    def to_canonical(self, key: str) -> str:
        """Returns the canonical name of a key."""
        return rename(key, ((_to_regex(theirs), _to_replacement(ours)) for theirs, ours in self.rules))

    def from_canonical(self, key: str) -> str:
        """Returns the key of a canonical name; the inverse of `to_canonical`."""
        return rename(key, ((_to_regex(ours), _to_replacement(theirs)) for theirs, ours in self.rules))


def _to_regex(rule: str) -> str:
    return "^" + re.escape(rule).replace(r"\*", r"(\d+)")


def _to_replacement(rule: str) -> str:
    first, *others = rule.split("*")
    return first + "".join(f"\\{i}{part}" for i, part in enumerate(others, 1))


CANONICAL_NAMING = Naming("canonical", "(?!)", ())
FAIR = Naming(
    "fair",
    r"downsample_layers\.0\.0\.",
    (
        ("downsample_layers.0.", "stem."),
        ("downsample_layers.*.", "stages.*.downsample."),
        ("stages.*.*.dwconv.", "stages.*.blocks.*.conv_dw."),
        ("stages.*.*.pwconv*.", "stages.*.blocks.*.mlp.fc*."),
        ("stages.*.*.", "stages.*.blocks.*."),
        ("norm.", "head.norm."),
        ("head.weight", "head.fc.weight"),
        ("head.bias", "head.fc.bias"),
    ),
)
_MMSEGMENTATION = (
    ("backbone.norm*.", "head.norm*."),
    ("decode_head.", "head.decode_head."),
    ("auxiliary_head.", "head.auxiliary_head."),
)
FAIR_UPERNET = Naming(
    "fair",
    r"backbone\.stages\.0\.0\.dwconv\.",
    (*_MMSEGMENTATION, *((f"backbone.{theirs}", ours) for theirs, ours in FAIR.rules[:-3])),
)
OPENMMLAB_UPERNET = Naming(
    "openmmlab",
    r"backbone\.stages\.0\.0\.depthwise_conv\.",
    tuple(
        (theirs.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv"), ours)
        for theirs, ours in FAIR_UPERNET.rules
    ),
)
TRANSFORMERS_UPERNET = Naming(
    "transformers",
    r"backbone\.embeddings\.patch_embeddings\.",
    (
        ("backbone.embeddings.patch_embeddings.", "stem.0."),
        ("backbone.embeddings.layernorm.", "stem.1."),
        ("backbone.encoder.stages.*.downsampling_layer.*.", "stages.*.downsample.*."),
        *(
            (f"backbone.encoder.stages.*.layers.*.{theirs}", f"stages.*.blocks.*.{ours}")
            for theirs, ours in (
                *(("layer_scale_parameter", "gamma"), ("dwconv.", "conv_dw.")),
                *(("layernorm.", "norm."), ("pwconv*.", "mlp.fc*.")),
            )
        ),
        *((f"backbone.hidden_states_norms.stage{i + 1}.", f"head.norm{i}.") for i in range(4)),
        *(
            (f"{module}.batch_norm.", f"head.{module}.bn.")
            for module in (
                *("decode_head.psp_modules.*.*", "decode_head.bottleneck", "decode_head.lateral_convs.*"),
                *("decode_head.fpn_convs.*", "decode_head.fpn_bottleneck", "auxiliary_head.convs.*"),
            )
        ),
        *((f"{head}.classifier.", f"head.{head}.conv_seg.") for head in ("decode_head", "auxiliary_head")),
        *_MMSEGMENTATION[1:],
    ),
)
SAIL = Naming(
    "sail-sg",
    r"downsample_layers\.0\.post_norm\.",
    (
        ("downsample_layers.0.conv.", "stem.conv."),
        ("downsample_layers.0.post_norm.", "stem.norm."),
        ("downsample_layers.*.conv.", "stages.*.downsample.conv."),
        ("downsample_layers.*.pre_norm.", "stages.*.downsample.norm."),
        ("stages.*.*.", "stages.*.blocks.*."),
        ("norm.", "head.norm."),
        ("head.", "head.fc."),  # also head.norm, the norm inside of the MLP head
    ),
    matrices=r".*\.(mlp\.fc|pwconv)\d\.weight",
)
PIT = Naming(
    "lab-lvm",
    r"pools\.0\.conv\.",
    (("pools.0.", "transformers.1.pool."), ("pools.1.", "transformers.2.pool.")),
)
TORCHVISION = Naming(
    "torchvision",
    r"blocks\.0\.layers\.0\.layers\.MBconv\.",
    (
        ("stem.0.0.", "stem.conv1."),
        ("stem.0.1.", "stem.norm1."),
        ("stem.1.0.", "stem.conv2."),
        *(
            (f"blocks.*.layers.*.layers.MBconv.{theirs}.", f"stages.*.blocks.*.conv.{ours}.")
            for theirs, ours in (
                ("proj.1", "shortcut.expand"),
                ("layers.pre_norm", "pre_norm"),
                ("layers.conv_a.0", "conv1_1x1"),
                ("layers.conv_a.1", "norm1"),
                ("layers.conv_b.0", "conv2_kxk"),
                ("layers.conv_b.1", "norm2"),
                ("layers.squeeze_excitation", "se"),
                ("layers.conv_c", "conv3_1x1"),
            )
        ),
        *(
            (f"blocks.*.layers.*.layers.{kind}_attention.{theirs}", f"stages.*.blocks.*.attn_{name}.{ours}")
            for kind, name in (("window", "block"), ("grid", "grid"))
            for theirs, ours in (
                ("attn_layer.0.", "norm1."),
                ("attn_layer.1.to_qkv.", "attn.qkv."),
                ("attn_layer.1.merge.", "attn.proj."),
                ("attn_layer.1.relative_position_bias_table", "attn.rel_pos.relative_position_bias_table"),
                ("mlp_layer.0.", "norm2."),
                ("mlp_layer.1.", "mlp.fc1."),
                ("mlp_layer.3.", "mlp.fc2."),
            )
        ),
        ("classifier.2.", "head.norm."),
        ("classifier.3.", "head.pre_logits.fc."),
        ("classifier.5.", "head.fc."),
    ),
)
TIMM_MOBILENET = Naming(
    "timm",
    r"blocks\.0\.0\.conv_dw\.",
    (
        ("conv_stem.", "layers.0.0.0."),
        ("bn1.", "layers.0.0.1."),
        ("conv_head.", "layers.5.0.0."),
        ("bn2.", "layers.5.0.1."),
        *(
            (f"blocks.{theirs}.{layer}.", f"layers.{ours}.{number}.")
            for theirs, ours in (("0.0", "0.1"), ("*.*", "*.*"))  # the canonical names count the stem in
            for layer, number in (("conv_dw", 0), ("bn1", 1), ("conv_pw", 3), ("bn2", 4))
        ),
        ("classifier.", "fc.2."),
    ),
)
RETINAFACE = Naming(
    "retinaface",
    r"stage3\.0\.3\.",
    (
        *(
            (f"stage1.{theirs}.", f"layers.{ours}.")
            for theirs, ours in enumerate(("0.0", "0.1", "1.0", "1.1", "2.0", "2.1"))
        ),
        ("stage2.", "layers.3."),
        ("stage3.", "layers.4."),
        ("fc.", "fc.2."),
    ),
)
_MIT_HEAD = (
    ("head.op_list.0.", "head.in_conv."),
    ("head.op_list.2.linear.", "head.classifier.0."),
    ("head.op_list.2.norm.", "head.classifier.1."),
    ("head.op_list.3.linear.", "head.classifier.4."),
)
MIT = Naming(
    "mit",
    r"backbone\.input_stem\.op_list\.",
    (
        ("backbone.input_stem.op_list.0.", "stem.in_conv."),
        ("backbone.input_stem.op_list.1.", "stem.res0."),
        ("backbone.stages.*.op_list.*.", "stages.*.blocks.*."),
        *_MIT_HEAD,
    ),
)
MIT_LARGE = Naming(
    "mit",
    r"backbone\.stages\.0\.op_list\.0\.conv\.",
    (
        ("backbone.stages.0.op_list.0.", "stem.in_conv."),
        ("backbone.stages.0.op_list.1.", "stem.res0."),
        *((f"backbone.stages.{i + 1}.op_list.*.", f"stages.{i}.blocks.*.") for i in range(4)),  # the stem counts
        *_MIT_HEAD,
    ),
)
# Cream numbers the blocks of each part of the network; the three that halve the map come first. timm names those.
_CREAM_PLACES = (
    *((f"patch_embed.{2 * i}.", f"patch_embed.conv{i + 1}.") for i in range(4)),
    ("blocks1.*.", "stages.0.blocks.*."),
    *(
        (f"blocks{stage + 1}.{theirs}.", f"stages.{stage}.{ours}.")
        for stage in (1, 2)
        for theirs, ours in (
            *(("0.*", "downsample.res1.*"), ("1", "downsample.patchmerge"), ("2.*", "downsample.res2.*")),
            *((str(block + 3), f"blocks.{block}") for block in range(4)),
        )
    ),
)
_CREAM_CONVS = (
    *("", "conv*.", "m.", "m.pw*.", "dw*.m.", "ffn*.m.pw*."),
    *(f"mixer.m.attn.{part}.*." for part in ("qkvs", "dws", "proj")),
)
CREAM = Naming(
    "microsoft",
    r"blocks1\.0\.dw0\.m\.c\.",
    (
        *((f"{theirs}{conv}c.", f"{ours}{conv}conv.") for theirs, ours in _CREAM_PLACES for conv in _CREAM_CONVS),
        *_CREAM_PLACES,
        ("head.l.", "head.linear."),
    ),
)


def _apple(attention: bool) -> Naming:
    """FastViT's authors number stages and what stands between them through; attention has a position encoding."""
    mobile_one = (
        *(("rbr_skip.", "identity."), ("rbr_conv.*.", "conv_kxk.*."), ("rbr_scale.", "conv_scale.")),
        *(("se.reduce.", "se.fc1."), ("se.expand.", "se.fc2."), ("", "")),
    )
    large_kernel = (("lkb_origin.", "large_conv."), ("lkb_reparam.", "reparam_conv."), ("", ""))
    block = (
        *((f"token_mixer.{part}.{a}", f"token_mixer.{part}.{b}") for part in ("mixer", "norm") for a, b in mobile_one),
        *((f"{name}", f"{name}.gamma") for name in ("token_mixer.layer_scale", "layer_scale_*", "layer_scale")),
        *(("convffn.", "mlp."), ("", "")),
    )
    last = 7 if attention else 6
    rules = [
        *((f"patch_embed.*.{a}", f"stem.*.{b}") for a, b in mobile_one),
        *((f"conv_exp.{a}", f"final_conv.{b}") for a, b in mobile_one),
        *((f"network.{n}.*.{a}", f"stages.{i}.blocks.*.{b}") for i, n in enumerate((0, 2, 4, last)) for a, b in block),
        *(("network.6.pe.", "stages.3.pos_emb.pos_enc."), ("network.6.", "stages.3.pos_emb.")),
        ("head.", "head.fc."),
    ]
    for i, n in ((1, 1), (2, 3), (3, 5)):
        rules += [(f"network.{n}.proj.0.{a}", f"stages.{i}.downsample.proj.0.{b}") for a, b in large_kernel]
        rules += [(f"network.{n}.proj.1.{a}", f"stages.{i}.downsample.proj.1.{b}") for a, b in mobile_one]
    return Naming("apple", rf"network\.{last}\.\d+\.convffn\.", tuple(rules))


def _cvnets(separable: bool) -> Naming:
    """MobileViT's authors number the stages from 1, and count the last norm of a stage among its transformers.

    The published networks have 2, 4 and 3 transformers in their last stages; the norm's number follows from that.
    """
    conv_norm_act = {
        "conv_1": "stem",
        "conv_1x1_exp": "final_conv",
        **{
            f"layer_{stage + 1}.*.block.{theirs}": f"stages.{stage}.*.{ours}"
            for stage in range(5)
            for theirs, ours in (("exp_1x1", "conv1_1x1"), ("conv_3x3", "conv2_kxk"), ("red_1x1", "conv3_1x1"))
        },
    }
    plain = {"classifier.1" if separable else "classifier.fc": "head.fc"}
    mixer, attention = ("attn", ("qkv_proj", "out_proj")) if separable else ("mha", ("qkv", "proj"))
    conv, last = (".block.conv", 3) if separable else ("", 4)  # v2's linear layers are 1x1 convolutions
    for stage, depth in ((2, 2), (3, 4), (4, 3)):
        theirs, ours = f"layer_{stage + 1}.1", f"stages.{stage}.1"
        conv_norm_act |= {
            f"{theirs}.local_rep.{'0' if separable else 'conv_3x3'}": f"{ours}.conv_kxk",
            f"{theirs}.conv_proj": f"{ours}.conv_proj",
            f"{theirs}.fusion": f"{ours}.conv_fusion",
        }
        plain |= {
            f"{theirs}.local_rep.{'1' if separable else 'conv_1x1'}.block.conv": f"{ours}.conv_1x1",
            f"{theirs}.global_rep.*.pre_norm_{mixer}.0": f"{ours}.transformer.*.norm1",
            f"{theirs}.global_rep.*.pre_norm_{mixer}.1.qkv_proj{conv}": f"{ours}.transformer.*.attn.{attention[0]}",
            f"{theirs}.global_rep.*.pre_norm_{mixer}.1.out_proj{conv}": f"{ours}.transformer.*.attn.{attention[1]}",
            f"{theirs}.global_rep.*.pre_norm_ffn.0": f"{ours}.transformer.*.norm2",
            f"{theirs}.global_rep.*.pre_norm_ffn.1{conv}": f"{ours}.transformer.*.mlp.fc1",
            f"{theirs}.global_rep.*.pre_norm_ffn.{last}{conv}": f"{ours}.transformer.*.mlp.fc2",
            f"{theirs}.global_rep.{depth}": f"{ours}.norm",
        }
    rules = [
        *(
            (f"{a}.block.{x}.", f"{b}.{y}.")
            for a, b in conv_norm_act.items()
            for x, y in (("conv", "conv"), ("norm", "bn"))
        ),
        *((f"{a}.", f"{b}.") for a, b in plain.items()),
    ]
    return Naming("cvnets", rf"layer_3\.1\.local_rep\.{'0' if separable else 'conv_3x3'}\.", tuple(rules))


# By dialect: the naming of each backbone, or of a backbone with a certain head.
DIALECTS: dict[str, Mapping[str, Naming]] = {
    "timm": {
        **dict.fromkeys(("ConvNeXt", "EfficientViT", "EfficientViTLarge", "EfficientViTMSRA"), CANONICAL_NAMING),
        **dict.fromkeys(("FastViT", "FastViTSA"), CANONICAL_NAMING),
        **dict.fromkeys(("MaxxViT", "MetaFormer", "MobileViT", "MobileViTV2"), CANONICAL_NAMING),
        **dict.fromkeys(("PiT", "ResNet", "ViT"), CANONICAL_NAMING),
        "MobileNetV1": TIMM_MOBILENET,
    },
    "sail-sg": {"MetaFormer": SAIL},
    "fair": {"ConvNeXt": FAIR, "ConvNeXt with UPerNetHead": FAIR_UPERNET},
    "openmmlab": {"ConvNeXt with UPerNetHead": OPENMMLAB_UPERNET},
    "transformers": {"ConvNeXt with UPerNetHead": TRANSFORMERS_UPERNET},
    "lab-lvm": {
        **dict.fromkeys(
            ("CSWin", "FasterViT", "MaxxViT", "MobileNetV1", "ResNet", "SEResNet", "ViT"), CANONICAL_NAMING
        ),
        "ConvNeXt": FAIR,
        "ConvNeXt with GramianHead": CANONICAL_NAMING,
        "PiT": PIT,
    },
    "nvlabs": {"FasterViT": CANONICAL_NAMING},
    "microsoft": {"CSWin": CANONICAL_NAMING, "EfficientViTMSRA": CREAM},
    "torchvision": {"MaxxViT": TORCHVISION, "ResNet": CANONICAL_NAMING},
    "retinaface": {"MobileNetV1": RETINAFACE},
    "mit": {"EfficientViT": MIT, "EfficientViTLarge": MIT_LARGE},
    "apple": {"FastViT": _apple(attention=False), "FastViTSA": _apple(attention=True)},
    "cvnets": {"MobileViT": _cvnets(separable=False), "MobileViTV2": _cvnets(separable=True)},
}


def detect_naming(keys: Iterable[str]) -> Naming:
    """Returns the naming that the keys follow."""
    keys = list(keys)
    known = (naming for backbones in DIALECTS.values() for naming in backbones.values())
    return next((naming for naming in known if any(re.match(naming.marker, key) for key in keys)), CANONICAL_NAMING)


def naming_for(dialect: str | None, backbone: str, head: str) -> Naming:
    """Returns the naming of a backbone and a head in a dialect.

    Args:
      dialect: a key of `DIALECTS`; None for the canonical names.
      backbone: name of the class of the backbone.
      head: name of the class of the head.

    Raises:
      UserError: there is no such dialect, or it does not have the backbone.
    """
    if dialect is None:
        return CANONICAL_NAMING
    if dialect not in DIALECTS:
        raise UserError(f"there is no dialect '{dialect}', only {', '.join(DIALECTS)}.")
    for what in (f"{backbone} with {head}", backbone):
        if what in DIALECTS[dialect]:
            return DIALECTS[dialect][what]
    both = f"{backbone} with {head}"
    others = ", ".join(name for name, backbones in DIALECTS.items() if {backbone, both} & backbones.keys())
    raise UserError(f"there is no {both} in the dialect {dialect}: give one of {others}.")


def rename(key: str, renames: Iterable[tuple[str, str]]) -> str:
    """Rewrites a key by the first pair of a pattern and its replacement that matches it."""
    for pattern, replacement in renames:
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key
