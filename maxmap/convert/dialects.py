"""Names in state dicts where they are not the Flax path with its digits split off.

Two short lists of regular expressions, never a key table per model: `CANONICAL` for the names that the reference
itself uses (timm's where timm has the family, the author's otherwise), `DIALECTS` for other authors' names of the same
networks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# By class of the head, then by class of the backbone: from the name by rule (`head.` and the path) to the reference's;
# the first pattern that matches counts.
CANONICAL: dict[str, list[tuple[str, str]]] = {
    "CSWin": [(r"^head\.fc\.", "head.")],
    "FasterViT": [(r"^head\.fc\.", "head.")],
    "GramianHead": [(r"^head\.", "")],
    "MAPHead": [(r"\.norm1\.([12])\.", r".norm1_\1.")],
    "MetaFormer": [(r"\.(act1?|res_scale[12])\.weight$", r".\1.scale")],
    "MobileNetV1": [(r"^head\.fc\.", "fc.2."), (r"^head\.", "fc.")],
    "PiT": [(r"^head\.fc\.", "head.")],
    "ResNet": [(r"^head\.fc\.", "fc.")],
    "SEResNet": [(r"^head\.fc\.", "head.")],
    "ViT": [(r"^head\.fc\.", "head.")],
}

# Second names, in the reference, of one and the same tensor.
ALIASES: list[tuple[str, str]] = [(r"\.to_global_feature\.pos\.", ".pos_embed.")]


@dataclass(frozen=True)
class Dialect:
    """Another author's names.

    Attributes:
      name: for messages and `to_torch`.
      marker: matches a key that only this dialect has.
      renames: patterns and replacements to canonical names; the first that matches a key counts.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str], ...]


DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        "fair",
        r"downsample_layers\.0\.0\.",
        (
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
            (r"^stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
            (r"^stages\.(\d+)\.(\d+)\.pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
            (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"^norm\.", "head.norm."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ),
    ),
    Dialect(
        "lab-lvm",
        r"pools\.0\.conv\.",
        ((r"^pools\.0\.", "transformers.1.pool."), (r"^pools\.1\.", "transformers.2.pool.")),
    ),
    Dialect(
        "sail-sg",
        r"downsample_layers\.0\.post_norm\.",
        (
            (r"^downsample_layers\.0\.conv\.", "stem.conv."),
            (r"^downsample_layers\.0\.post_norm\.", "stem.norm."),
            (r"^downsample_layers\.(\d+)\.conv\.", r"stages.\1.downsample.conv."),
            (r"^downsample_layers\.(\d+)\.pre_norm\.", r"stages.\1.downsample.norm."),
            (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"^norm\.", "head.norm."),
            (r"^head\.", "head.fc."),  # also head.norm, the norm inside of the MLP head
        ),
    ),
)


def recognise(keys: Iterable[str]) -> Dialect | None:
    """Returns the dialect that the keys are written in, None for canonical names."""
    keys = list(keys)
    return next((d for d in DIALECTS if any(re.match(d.marker, key) for key in keys)), None)


def rename(key: str, renames: Iterable[tuple[str, str]]) -> str:
    """Rewrites a key by the first pattern that matches it."""
    for pattern, replacement in renames:
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    return key
