"""Backbones: images `[B, H, W, C]` in, a list of NHWC feature maps out; one file or package per family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import linen as nn


@dataclass(frozen=True)
class Variant:
    """A named backbone with its plain classifier, as published.

    Attributes:
      backbone: class of the backbone.
      classifier: fields of `LinearHead` where they differ from its defaults.
      fields: of the backbone where they differ from its defaults.
    """

    backbone: type[nn.Module]
    classifier: Mapping[str, Any]
    fields: Mapping[str, Any]
