"""Where names, backbones and heads meet: `Classifier`, `create_model`, `list_models`."""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from maxmap.backbones import (
    Variant,
    convnext,
    cswin,
    efficientvit,
    efficientvit_msra,
    fastervit,
    fastvit,
    fcaformer,
    maxxvit,
    metaformer,
    mobilenet,
    mobilevit,
    pit,
    resnet,
    vit,
)
from maxmap.errors import UserError, nearest
from maxmap.heads.gramian import GramianHead
from maxmap.heads.linear import LinearHead
from maxmap.heads.map import MAPHead
from maxmap.heads.upernet import UPerNetHead
from maxmap.layers.folded import Neighbours, fold_batch_norms, neighbours
from maxmap.layers.images import channels_error, check_images, size_error
from maxmap.layers.primitives import Block, pair
from maxmap.operations import Array, kernels, upcast
from maxmap.ranges import CountOrZero, Pixels, check_arguments, check_fields

FAMILIES: dict[str, Mapping[str, Variant]] = {
    "convnext": convnext.VARIANTS,
    "cswin": cswin.VARIANTS,
    "efficientvit": efficientvit.VARIANTS,
    "efficientvit_msra": efficientvit_msra.VARIANTS,
    "fastervit": fastervit.VARIANTS,
    "fastvit": fastvit.VARIANTS,
    "fcaformer": fcaformer.VARIANTS,
    "maxxvit": maxxvit.VARIANTS,
    "metaformer": metaformer.VARIANTS,
    "mobilenet": mobilenet.VARIANTS,
    "mobilevit": mobilevit.VARIANTS,
    "pit": pit.VARIANTS,
    "resnet": resnet.VARIANTS,
    "vit": vit.VARIANTS,
}
BACKBONES = {name: variant for variants in FAMILIES.values() for name, variant in variants.items()}
HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "map": MAPHead, "gramian": GramianHead}
PIXEL_HEADS: dict[str, type[nn.Module]] = {"upernet": UPerNetHead}  # classify every pixel: semantic segmentation


def classifies_pixels(model: nn.Module) -> bool:
    """Whether a model has one of the `PIXEL_HEADS`."""
    return isinstance(getattr(model, "head", None), tuple(PIXEL_HEADS.values()))


def require_head(model: nn.Module, dense: bool, whose: str) -> None:
    """Raises UserError unless a model classifies what it is asked for; `whose` begins the sentence.

    Args:
      model: Of `create_model`.
      dense: Whether pixels are to be classified, and not images.
      whose: What has the head.
    """
    pixels = classifies_pixels(model)
    if pixels and not dense:
        raise UserError(
            f"{whose} has a head that classifies pixels, not images: it takes images with masks, by the task "
            "'segmentation' (docs/segmentation.md)."
        )
    if dense and not pixels:
        heads = " or ".join(f"--config.model.head={name}" for name in PIXEL_HEADS)
        raise UserError(
            f"{whose} has a head that classifies images, not pixels, which the task 'segmentation' asks for: "
            f"set {heads}."
        )


class Classifier(nn.Module):
    """A backbone and a head.

    Attributes:
      backbone: images `[B, H, W, C]` to a list of NHWC feature maps.
      head: feature maps to branches of logits.
      remat: the backward pass computes the inside of the backbone's blocks once more instead of reading it from memory.
        That takes less memory and about a third more time, and does not change the results.
    """

    backbone: nn.Module
    head: nn.Module
    remat: bool = False

    def __call__(self, images: Array, *, train: bool = False) -> dict[str, Array]:
        """Classifies normalised images.

        Args:
          images: float `[B, H, W, C]`.
          train: uses batch statistics and dropout (needs the "dropout" RNG), and returns what only losses need.

        Returns:
          'logits' `[G, B, K]` (G branches), or `[G, B, h, w, K]` of a head that classifies pixels, and 'embedding'
          `[B, D]`. While training also what losses need: 'distill' `[G, B, K]` of a head that distils itself,
          'auxiliary' `[G, B, h, w, K]` of one that classifies pixels.
        """
        features = self.features(images, train=train)
        with self._named_misfits(images):
            outputs = self.head(features, train=train)
        if not isinstance(outputs, dict) or jnp.ndim(outputs.get("logits", 0)) not in (3, 5):
            raise UserError(
                f"the head {type(self.head).__name__} returns something else than a head does: let it return "
                "{'logits': [branches, B, classes], 'embedding': [B, D]}."
            )
        return outputs

    def features(self, images: Array, *, train: bool = False) -> list[Array]:
        """Returns the NHWC maps of the stem and of every stage."""
        check_images(images, None if self.is_initializing() else self.variables.get("params", {}).get("backbone"))
        hooks = contextlib.nullcontext()
        if self.remat and not self.is_initializing():
            hooks = nn.intercept_methods(_rematerialisation())
        with self._named_misfits(images), hooks:
            features = self.backbone(images, train=train)
        if not isinstance(features, list | tuple) or {jnp.ndim(x) for x in features} != {4}:
            raise UserError(
                f"the backbone {type(self.backbone).__name__} returns something else than a backbone does: let it "
                "return a list of maps [B, H, W, C], the stem's first."
            )
        return list(features)

    @contextlib.contextmanager
    def _named_misfits(self, images: Array) -> Iterator[None]:
        """Says in a sentence that images have other channels, or another size, than the weights are made for."""
        try:
            yield
        except (ScopeParamShapeError, ScopeParamNotFoundError) as error:
            told = channels_error(images, error) or size_error(images, self.backbone.image_size)
            raise told or error from None

    def forward_features(self, images: Array, *, train: bool = False) -> Array:
        """Returns the last map `[B, H, W, C]` in front of the pooling, as timm's method of this name does.

        It is normalised if the head is a linear one that normalises before it pools.
        """
        features = self.features(images, train=train)
        if isinstance(self.head, LinearHead):
            return cast(Array, self.head(features, train=train, pool=False))
        return features[-1]

    def embed(self, images: Array, *, train: bool = False) -> Array:
        """Returns the pooled `[B, D]` in front of the classifier."""
        outputs = self(images, train=train)
        if "embedding" not in outputs:
            raise UserError(f"the head {type(self.head).__name__} returns no 'embedding' [B, D]: let it return one.")
        return outputs["embedding"]


def _rematerialisation() -> Callable[..., Any]:
    """Returns a hook for `nn.intercept_methods` that calls every block as a `jax.checkpoint`."""
    inside = False  # of a block: a block that is part of another one is not checkpointed by itself

    def hook(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        if inside or context.method_name != "__call__" or not isinstance(context.module, Block):
            return call(*args, **kwargs)
        # The method without its module, because `nn.remat` passes a module of its own.
        function = cast(functools.partial, context.orig_method).func
        inside = True
        try:
            return nn.remat(lambda module, *args: function(module, *args, **kwargs))(context.module, *args)
        finally:
            inside = False

    return hook


# Methods by which modules compute, or hand out their weights to what computes with them.
CALLED = ("__call__", "gate", "weights")


def block_paths(model: Classifier) -> list[list[str]]:
    """Lists the modules of a model's backbone in the order in which they run, by block.

    It traces the model once and computes nothing; a large model takes some seconds.

    Returns:
      Paths such as 'backbone/stages_0/blocks_1', in one list for the stem and one for each block. A block's list has
      the modules between the block before and this one (a downsampling), then those inside, and the block itself last.
    """
    groups: list[list[str]] = [[]]
    known: set[str] = set()
    inside = False

    def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        path = "/".join(context.module.path)
        if context.method_name not in CALLED or path in known:
            return call(*args, **kwargs)
        known.add(path)
        if inside or not isinstance(context.module, Block):
            groups[-1].append(path)
            return call(*args, **kwargs)
        if len(groups) == 1:
            groups.append([])  # the first block ends the stem
        inside = True
        result = call(*args, **kwargs)
        inside = False
        groups[-1].append(path)
        groups.append([])
        return result

    images = jax.ShapeDtypeStruct((1, *pair(model.backbone.image_size), 3), jnp.float32)
    with nn.intercept_methods(record), kernels("plain"):  # kernels do not call the modules that they compute
        jax.eval_shape(functools.partial(model.init, method="features"), jax.random.key(0), images)
    if len(groups) > 1:
        behind = groups.pop()
        groups[-1][:0] = behind
    return groups


def average(outputs: Mapping[str, Array]) -> Array:
    """Returns the prediction `[B, K]`: the mean of the branches' logits (not of their probabilities)."""
    return jnp.mean(upcast(outputs["logits"]), axis=0)


def fuse(model: Classifier, variables: Mapping[str, Any]) -> tuple[Classifier, dict[str, Any]]:
    """Makes the form for inference, which computes the same features and outputs.

    A backbone that trains with branches (FastViT) gets its published form, with single convolutions in their place. Of
    every other model, and of that form, each batch norm is folded into the convolution or linear map beside it where
    that is exact. It traces the model once; a large one takes some seconds.

    Args:
      model: of `create_model`.
      variables: of the model.

    Returns:
      The fused model and its variables, for calls without `train`.

    Raises:
      UserError: there is no batch norm to fold.
    """
    if missing := sorted({"params", "batch_stats"} - variables.keys()):
        raise UserError(f"there is no batch norm to fold: the variables have no {' and no '.join(missing)}.")
    if getattr(model.backbone, "fused", None) is False:
        params, statistics = variables["params"], variables["batch_stats"]
        backbone, fused, running = model.backbone.fuse(params["backbone"], statistics["backbone"])
        return model.clone(backbone=backbone), {
            "params": {**params, "backbone": fused},
            "batch_stats": {**statistics, "backbone": running},
        }
    folded = fold_batch_norms(variables, foldable_norms(model))
    if len(jax.tree.leaves(folded)) == len(jax.tree.leaves(variables)):
        raise UserError(
            f"there is no batch norm to fold in {type(model.backbone).__name__} with {type(model.head).__name__}, or "
            "the variables are fused already: take them as they are."
        )
    return model, folded


def foldable_norms(model: Classifier) -> Neighbours:
    """Returns the batch norms of a model that `fuse` can fold."""

    def run(images: Array) -> tuple[list[Array], Any]:
        return model.init_with_output(jax.random.key(0), images, method=_features_and_outputs)[0]

    with kernels("plain"):  # kernels do not call the modules that they compute
        return neighbours(run, jax.ShapeDtypeStruct((1, *pair(model.backbone.image_size), 3), jnp.float32))


def _features_and_outputs(model: Classifier, images: Array) -> tuple[list[Array], dict[str, Array]]:
    features = model.features(images)
    return features, model.head(features)


@dataclass(frozen=True)
class _Model:
    """A named model: a name in `BACKBONES`, the fields of its head, and what it changes in the backbone's fields."""

    backbone: str
    head: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)


_ERF = {"conv": {"activation": "gelu"}, "transformer": {"activation": "gelu"}}


# Gramian attention with taps inside of the third stage. The rate of ConvNeXt's drop path keeps rising in the head.
def _ga_convnext(backbone: str, channels: int, attention_width: int, taps: int, **fields: Any) -> _Model:
    head = {"name": "gramian", "channels": channels, "attention_width": attention_width}
    return _Model(backbone, head, {"taps": taps, "drop_path_endpoint": False, **fields})


def _ga_cswin(backbone: str, taps: int, aggregation_mlp_groups: int) -> _Model:
    head = {
        "name": "gramian",
        "aggregation": "cswin",
        "aggregation_mlp_groups": aggregation_mlp_groups,
        "block": "cswin",
        "contraction_groups": 8,
        "mlp_groups": 2,
        "init_scheme": "trunc_normal_linear",
    }
    return _Model(backbone, head, {"deep_stem": True, "taps": taps})


MODELS: dict[str, _Model] = {
    name: _Model(name, {"name": "linear", **variant.classifier}) for name, variant in BACKBONES.items()
} | {
    # MAP's copy of MaxViT-T has the exact GELU where timm's and Google's have the tanh form; its head is `MAPHead`'s
    # default.
    "map_maxvit_tiny_tf_224": _Model("maxvit_tiny_tf_224", {"name": "map"}, _ERF),
    "map_maxvit_mini_32": _Model(
        "maxvit_mini_32",
        {
            "name": "map",
            "channels": 96,
            "level": 1,
            "branches": 2,
            "gram_channels": 48,
            "gram_groups": 8,
            "heads": 3,
        },
        _ERF,
    ),
    "map_mobilenet_v1": _Model(
        "mobilenet_v1",
        {
            "name": "map",
            "channels": 192,
            "level": -1,
            "branches": 1,
            "tokens": 4,
            "self_distill": False,
            "gram_channels": 192,
            "gram_groups": 32,
            "heads": 6,
            "interactive": True,
            "mlp_ratio": 1.0,
            "mlp_groups": 1,
            "classifier": "linear",
        },
    ),
    "map_pit_s": _Model(
        "pit_s",
        {"name": "map", "level": 2, "branches": 2, "tokens": 4, "gram_groups": 32, "attention_width": 192},
    ),
    "map_faster_vit_3_224": _Model(
        "faster_vit_3_224",
        {
            "name": "map",
            "branches": 5,
            "tokens": 3,
            "gram_groups": 32,
            "heads": 32,
            "interactive": True,
            "classifier": "linear",
            "init_scheme": "trunc_normal_linear",
        },
    ),
    "map_resnet50": _Model(
        "resnet50_se_deep",
        {"name": "map", "tokens": 4, "gram_groups": 32, "interactive": True, "init_scheme": "he"},
    ),
    "map_convnext_tiny": _Model("convnext_tiny", {"name": "map", "init_scheme": "trunc_normal"}),
    "map_convnext_small": _Model(
        "convnext_small", {"name": "map", "tokens": 3, "gram_groups": 16, "init_scheme": "trunc_normal"}
    ),
    "ga_convnext_tiny_688": _ga_convnext("convnext_tiny", 688, 168, taps=2, embed_dim=(96, 192, 384, 688)),
    "ga_convnext_tiny_768": _ga_convnext("convnext_tiny", 768, 192, taps=2),
    "ga_convnext_small_688": _ga_convnext("convnext_small", 688, 168, taps=4, embed_dim=(96, 192, 384, 688)),
    "ga_convnext_small_768": _ga_convnext("convnext_small", 768, 192, taps=4),
    "ga_convnext_base_976": _ga_convnext("convnext_base", 976, 240, taps=4, embed_dim=(128, 256, 512, 976)),
    "ga_convnext_base_1024": _ga_convnext("convnext_base", 1024, 256, taps=4),
    # The first two have the defaults of the released class. Several settings of it have the published 42.0M and 54.3M
    # parameters, and the paper does not say which it used: the last two are one of them.
    "ga_cswin_tiny": _ga_cswin("CSWin_64_12211_tiny_224", taps=4, aggregation_mlp_groups=1),
    "ga_cswin_small": _ga_cswin("CSWin_64_24322_small_224", taps=4, aggregation_mlp_groups=1),
    "ga_cswin_tiny_p42": _ga_cswin("CSWin_64_12211_tiny_224", taps=5, aggregation_mlp_groups=4),
    "ga_cswin_small_p54": _ga_cswin("CSWin_64_24322_small_224", taps=5, aggregation_mlp_groups=4),
    # No code was released for these two. Their settings fit the published parameters with one branch and with five, and
    # the operations; others fit too, see docs/references.md.
    "ga_resnet50": _Model(
        "resnet50",
        {"name": "gramian", "channels": 1072, "gram_channels": 96, "attention_width": 256, "mlp_ratio": 3.0},
        {"embed_dim": (256, 512, 1024, 1024)},
    ),
    "ga_vit_small": _Model(
        "vit_small_patch16_224",
        {
            "name": "gramian",
            "channels": 384,
            "aggregation": "none",
            "gram_channels": 64,
            "attention_width": 48,
            "mlp_groups": 2,
        },
        {"class_token": False},
    ),
}


_OWN = _Model("", {"name": "linear"})  # a backbone of the user's own


def list_models(pattern: str = "*") -> list[str]:
    """Returns the names of models that match a shell pattern, for example "map_*", in alphabetical order."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(
    name: str | nn.Module,
    *,
    head: str | Mapping[str, Any] | nn.Module | None = None,
    num_classes: CountOrZero | None = None,
    image_size: Pixels | tuple[Pixels, Pixels] | None = None,
    remat: bool = False,
    pad: bool = False,
    **fields: Any,
) -> Classifier:
    """Builds a model by name, or of modules of one's own; nothing is initialised yet.

    Args:
      name: one of `list_models()`: timm's names for timm's models, the papers' names for `map_*`. Or a backbone of
        one's own: a module with a field `image_size` that maps images, with a keyword `train`, to a list of NHWC maps.
      head: "linear", "map" or "gramian" for any head on this backbone, "upernet" for one that classifies every pixel,
        or a mapping of the head's fields, with or without 'name'; None for the model's own, or "linear". Or a head of
        one's own: a module that maps such a list, with a keyword `train`, to 'logits' `[G, B, K]` and 'embedding'
        `[B, D]`.
      num_classes: 1000 unless given; 0 for no classifier.
      image_size: pixels that windows and position tables are made for, one number or (height, width); None for the
        model's own.
      remat: saves memory in training: the backward pass computes the backbone's blocks once more.
      pad: takes images of sizes that attention windows, stripes or patches do not divide, too. What is appended to the
        maps is left out of the attention, and nothing else sees it. Other sizes compute the same as without it.
      **fields: fields of the backbone, for example `drop_path=0.2`; mappings are merged field by field.

    Returns:
      The model, a Flax module.

    Raises:
      UserError: an unknown name or field, a value of another type or out of range, or values that do not fit each
        other.
    """
    check_arguments(create_model, "model", locals())
    if image_size is not None:
        fields["image_size"] = image_size
    if isinstance(name, str):
        if name not in MODELS:
            raise _unknown_name(name)
        model = MODELS[name]
        if pad and "pad" in BACKBONES[model.backbone].backbone.__dataclass_fields__:  # the others take any size
            fields["pad"] = True
        backbone = _named_backbone(name, model, fields)
    else:
        if pad:
            fields["pad"] = True
        model, backbone = _OWN, _own_backbone(name, fields)
    if isinstance(head, nn.Module):
        if num_classes is not None:
            raise UserError(f"num_classes is a field of the named heads: give it to {type(head).__name__} itself.")
        return Classifier(backbone, head, remat)
    head_name, head_fields = _head_fields(model, head, num_classes)
    built_head = _build(
        (HEADS | PIXEL_HEADS)[head_name], {"num_classes": 1000} | head_fields, f"head '{head_name}'", "model.head"
    )
    if isinstance(name, str):  # a head checks itself against the maps of another backbone when it gets them
        with _one_sentence(name):
            built_head.validate(backbone.num_features())
    return Classifier(backbone, built_head, remat)


def _named_backbone(name: str, model: _Model, fields: Mapping[str, Any]) -> nn.Module:
    """Returns the backbone of a named model, with some of its fields changed."""
    variant = BACKBONES[model.backbone]
    merged = dict(variant.fields)
    for changes in (model.fields, fields):
        for key, value in changes.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
    backbone = _build(variant.backbone, merged, f"model '{name}'", "model")
    with _one_sentence(name):
        backbone.validate()
    return backbone


def _own_backbone(backbone: nn.Module, fields: Mapping[str, Any]) -> nn.Module:
    """Returns a backbone of the user's own."""
    what = type(backbone).__name__
    if fields:
        raise UserError(f"{', '.join(fields)}: these are fields of named backbones, so give them to {what} itself.")
    if not hasattr(backbone, "image_size"):
        raise UserError(
            f"the backbone {what} has no field image_size: give it one, for the pixels that it is made for (a number, "
            "or height and width)."
        )
    return backbone


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turns what a module's `validate` says into the sentence of a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


def _head_fields(
    model: _Model, head: str | Mapping[str, Any] | None, num_classes: int | None
) -> tuple[str, dict[str, Any]]:
    """Returns the name and the fields of a model's head, or of another head in its place."""
    fields = dict(model.head)
    if head is not None:
        given = {"name": head} if isinstance(head, str) else dict(head)
        if given.get("name", fields["name"]) != fields["name"]:
            fields = {}
        fields |= given
    if num_classes is not None:
        fields["num_classes"] = num_classes
    name = fields.pop("name")
    if name not in HEADS | PIXEL_HEADS:
        raise UserError(f"there is no head '{name}', only {', '.join(HEADS | PIXEL_HEADS)}.")
    return name, fields


def _build(module: type[nn.Module], fields: Mapping[str, Any], what: str, section: str) -> nn.Module:
    known = set(module.__dataclass_fields__) - {"parent", "name"}
    for key in fields:
        if key not in known and key in TIMM_WORDS:
            raise UserError(f"{what} has no field '{key}', a word of timm's: {TIMM_WORDS[key]}.")
        if key not in known:
            raise UserError(f"{what} has no field '{key}'; the nearest are {nearest(key, known)}.")
    check_fields(module, section, fields)
    return module(**{key: _hashable(value) for key, value in fields.items()})


def _hashable(value: Any) -> Any:
    """Returns a field as a value that can be hashed, whether Python wrote it or JSON: no dicts and no lists."""
    if isinstance(value, Mapping):
        return FrozenDict({key: _hashable(inner) for key, inner in value.items()})
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


_CHANNELS = "the images that model.init gets set the channels; `python -m maxmap convert` has --in-channels"
# What timm's `create_model` takes, and the right word for it here.
TIMM_WORDS: dict[str, str] = {
    "checkpoint_path": "maxmap.load(path) returns a checkpoint's model with its weights",
    "drop_path_rate": "write drop_path",
    "drop_rate": "write head={'dropout': RATE}",
    "features_only": "model.apply(variables, images, method='features') returns the feature maps of any model",
    "global_pool": "the head pools; head= gives its fields",
    "img_size": "write image_size",
    "in_chans": _CHANNELS,
    "in_channels": _CHANNELS,
    "out_indices": "model.apply(variables, images, method='features') returns all feature maps, to choose from",
    "pretrained": "maxmap.load('timm/NAME.TAG') returns a model with its published weights",
}


def _unknown_name(name: str) -> UserError:
    """Returns the error for a name of no model, which may be the name of a published checkpoint."""
    model, _, tag = name.rpartition("/")[2].rpartition(":")[2].partition(".")
    if model in MODELS:
        return UserError(
            f"'{name}' is the name of a checkpoint, and create_model makes models without weights: write "
            f"create_model('{model}'), or maxmap.load('timm/{model}.{tag or 'TAG'}') for the model with its weights."
        )
    return UserError(f"there is no model '{name}'; the nearest names are {nearest(name, MODELS)}.")
