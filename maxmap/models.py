"""Where names, backbones and heads meet: `Classifier`, `create_model`, `list_models`."""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from maxmap.backbones import maxxvit
from maxmap.errors import UserError, nearest
from maxmap.heads.linear import LinearHead
from maxmap.heads.map import MAPHead
from maxmap.layers import wide

Array = jax.Array

FAMILIES = {"maxxvit": maxxvit.VARIANTS}
BACKBONES = {name: variant for variants in FAMILIES.values() for name, variant in variants.items()}
HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "map": MAPHead}


class Classifier(nn.Module):
    """A backbone and a head.

    Attributes:
      backbone: images `[B, H, W, C]` to a list of NHWC feature maps.
      head: feature maps to branches of logits.
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(self, images: Array, *, train: bool = False) -> dict[str, Array]:
        """Classifies normalised images.

        Args:
          images: float `[B, H, W, C]`.
          train: uses batch statistics and dropout (needs the "dropout" RNG), and returns what only losses need.

        Returns:
          'logits' `[G, B, K]` (G branches), 'embedding' `[B, D]` and, while training a head with self-distillation,
          'distill' `[G, B, K]`.
        """
        return self.head(self.backbone(images, train=train), train=train)

    def features(self, images: Array, *, train: bool = False) -> list[Array]:
        """Returns the NHWC maps of the stem and of every stage."""
        return self.backbone(images, train=train)

    def embed(self, images: Array, *, train: bool = False) -> Array:
        """Returns the pooled `[B, D]` in front of the last linear map."""
        return self(images, train=train)["embedding"]


def average(outputs: Mapping[str, Array]) -> Array:
    """Returns the prediction `[B, K]`: the mean of the branches' logits (not of their probabilities)."""
    return jnp.mean(wide(outputs["logits"]), axis=0)


@dataclass(frozen=True)
class _Model:
    """A named model: which backbone with which changed fields, and which head."""

    backbone: str
    head: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)


# The plain classifiers that the backbones' names stand for, by family; the first pattern that matches counts.
_CLASSIFIERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "maxxvit": [
        (r"maxvit_\w+_tf_\d+|maxvit_mini_32", {"norm": "after", "epsilon": 1e-5, "hidden_ratio": 1.0}),
        (
            r"coatnet_[0-5]_\d+|maxvit_rmlp_base_rw_\d+|maxxvitv2_rmlp_large_rw_\d+",
            {"norm": "after", "hidden_ratio": 1.0},
        ),
        (r"coatnet_bn_0_rw_\d+", {"norm": "before", "norm_type": "batch"}),
        (r".*", {"norm": "before"}),
    ],
}


def _plain(family: str, name: str) -> _Model:
    fields = next(fields for pattern, fields in _CLASSIFIERS[family] if re.fullmatch(pattern, name))
    return _Model(name, {"name": "linear", **fields})


_ERF = {"conv": {"activation": "gelu"}, "transformer": {"activation": "gelu"}}


MODELS: dict[str, _Model] = {
    name: _plain(family, name) for family, variants in FAMILIES.items() for name in variants
} | {
    # MAP's copy of MaxViT-T has the exact GELU where timm's and Google's have the tanh form; its head is `MAPHead`'s
    # default.
    "map_maxvit_tiny_tf_224": _Model("maxvit_tiny_tf_224", {"name": "map"}, _ERF),
    "map_maxvit_mini_32": _Model(
        "maxvit_mini_32",
        {
            "name": "map",
            "channels": 96,
            "level": 2,
            "branches": 2,
            "gram_channels": 48,
            "gram_groups": 8,
            "heads": 3,
        },
        _ERF,
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of models that match a shell pattern, for example "map_*", in alphabetical order."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(
    name: str,
    *,
    head: str | Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    **fields: Any,
) -> Classifier:
    """Builds a model by name; nothing is initialised yet.

    Args:
      name: one of `list_models()`: timm's names for timm's models, the papers' names for `map_*`.
      head: "linear" or "map" for any head on this backbone, or a mapping of the head's fields, with or without 'name';
        None for the model's own.
      num_classes: 1000 unless given; 0 for no classifier.
      image_size: pixels that windows and position tables are made for, one number or (height, width); None for the
        model's own.
      **fields: fields of the backbone, for example `drop_path=0.2`; mappings are merged field by field.

    Returns:
      The model, a Flax module.

    Raises:
      UserError: an unknown name or field, or values that do not fit each other.
    """
    if name not in MODELS:
        raise UserError(f"there is no model '{name}'; the nearest names are {nearest(name, MODELS)}.")
    model = MODELS[name]
    head_fields = dict(model.head)
    if isinstance(head, str):
        head = {"name": head}
    if head is not None:
        head = dict(head)
        if head.get("name", head_fields["name"]) != head_fields["name"]:
            head_fields = {}
        head_fields |= head
    if num_classes is not None:
        head_fields["num_classes"] = num_classes
    head_name = head_fields.pop("name")
    if head_name not in HEADS:
        raise UserError(f"there is no head '{head_name}', only {', '.join(HEADS)}.")

    backbone = BACKBONES[model.backbone]
    if image_size is not None:
        fields["image_size"] = image_size
    merged = dict(backbone.keywords)
    for changes in (model.fields, fields):
        for key, value in changes.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
    built_backbone = _build(backbone.func, merged, f"model '{name}'")
    built_head = _build(HEADS[head_name], {"num_classes": 1000} | head_fields, f"head '{head_name}'")
    try:
        built_backbone.validate()
        built_head.validate(built_backbone.num_features())
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None
    return Classifier(built_backbone, built_head)


def _build(module: type[nn.Module], fields: Mapping[str, Any], what: str) -> nn.Module:
    known = set(module.__dataclass_fields__) - {"parent", "name"}
    for key in fields:
        if key not in known:
            raise UserError(f"{what} has no field '{key}'; the nearest are {nearest(key, known)}.")
    return module(**fields)
