"""Optimizers by name, and which parameters they decay and train; composed from optax.

    adamw      Decay is decoupled and times the rate, as in torch (Loshchilov and Hutter 2019).
    lamb       optax's: every tensor gets a trust ratio (You et al. 2020).
    lamb_timm  timm's, see `_lamb_timm`; its `max_grad_norm` clips after `clip_norm`, inf turns it off.
    sgd        Nesterov momentum. Decay is added to the gradient, as in torch.
    momentum   The same with plain momentum; both names are timm's.
    lion       Decoupled decay (Chen et al. 2023).
    adafactor  Factored moments; the update is clipped at an RMS of 1 and scaled by the RMS of the parameter (Shazeer
               and Stern 2018). Decay is times the rate, as for all the others, unlike in `optax.adafactor`.
    muon       Every decayed tensor is a matrix [rest, last axis], its update scaled to the size of AdamW's (Liu et al.
               2025); Nesterov Adam for the other tensors.

The signatures of `OPTIMIZERS` hold the defaults of their options.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

import jax
import optax
import optax.contrib

from maxmap.errors import UserError, nearest
from maxmap.ranges import Decay, Fraction, NonNegative, Positive, Range, check, check_arguments

PyTree = Any
Mask = Callable[[PyTree], PyTree]
Rate: TypeAlias = optax.ScalarOrSchedule
Transformation: TypeAlias = optax.GradientTransformation

# Searched in paths such as 'backbone/stages_0/blocks_1/attn_block/attn/rel_pos/relative_position_bias_table'.
# The last three must be whole leaf names: FasterViT has position MLPs below 'pos_embed/', and those decay.
NO_DECAY = (
    r"(^|/)relative_position_bias_table$",
    r"(^|/)attention_biases$",
    r"(^|/)rel_pos/mlp/",
    r"(^|/)pos_embed$",
    r"(^|/)cls_token$",
    r"(^|/)cross_scale$",  # FcaFormer's factors of tokens, which are layer scales in shape of a matrix
)
# The classifiers of all heads, which adaptive clipping leaves alone.
CLASSIFIER = r"^head/((fc|heads|self_dt_heads)(_\d+)?|(decode|auxiliary)_head/conv_seg)/"
FROZEN = (r"(^|/)random_matrix$",)  # RandFormer's token mixers: drawn once, never trained


def decay_mask(params: PyTree, no_decay: Sequence[str] = NO_DECAY) -> PyTree:
    """Marks what weight decay applies to: leaves of two or more axes that are no bias and match no `no_decay` regex.

    These are timm's groups for every model here. Norm scales, layer scales, biases, relative position tables (and the
    MLPs that replace them in timm's MaxxViT), absolute position embeddings, class tokens and FcaFormer's scale factors
    do not decay.

    Args:
      params: nested dicts of arrays (or of anything with `.ndim`).
      no_decay: regexes searched in the path of a leaf, its keys joined by '/'.

    Returns:
      The same tree with a bool for every leaf.
    """
    patterns = [re.compile(pattern) for pattern in no_decay]

    def decays(path: tuple, leaf: Any) -> bool:
        name = _join(path)
        return leaf.ndim >= 2 and not re.search(r"(^|/)bias$", name) and not any(p.search(name) for p in patterns)

    return jax.tree_util.tree_map_with_path(decays, params)


def trainable_mask(params: PyTree, freeze: Sequence[str] = ()) -> PyTree:
    """Marks what is trained: everything but RandFormer's random matrices and what matches a `freeze` regex.

    Args:
      params: nested dicts; only the paths of the leaves count.
      freeze: regexes searched in the path of a leaf, its keys joined by '/'.

    Returns:
      The same tree with a bool for every leaf.
    """
    patterns = [re.compile(pattern) for pattern in (*FROZEN, *freeze)]
    return jax.tree_util.tree_map_with_path(lambda path, _: not any(p.search(_join(path)) for p in patterns), params)


def check_frozen(params: PyTree, freeze: Sequence[str]) -> None:
    """Raises UserError if a `freeze` regex matches no parameter, or if all of them are frozen."""
    paths = [_join(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in freeze:
        if not any(re.search(pattern, path) for path in paths):
            modules = sorted({"/".join(path.split("/")[:2]) for path in paths})
            raise UserError(
                f"optim.freeze holds {pattern!r}, which matches no parameter; it is searched in paths such as "
                f"{paths[0]}, and the nearest modules are {nearest(pattern, modules)}."
            )
    if not any(jax.tree.leaves(trainable_mask(params, freeze))):
        raise UserError(f"optim.freeze {list(freeze)} leaves no parameter to train: leave out a pattern.")


def depths(params: PyTree, blocks: Sequence[Sequence[str]]) -> PyTree:
    """Numbers the leaves from the input to the output for layer-wise decay of the learning rate.

    timm counts blocks too for most families, but stages for MaxViT.

    Args:
      params: nested dicts; only the paths of the leaves count.
      blocks: of the model, see `maxmap.models.block_paths`.

    Returns:
      The same tree with an int for every leaf: 0 in the stem and for position embeddings and tokens, 1 to N in the
      backbone's blocks in order, each with the downsampling in front of it, and N + 1 in the head.
    """
    number = {path: i for i, paths in enumerate(blocks) for path in paths}

    def depth(path: tuple, _: Any) -> int:
        module = _join(path[:-1])
        return len(blocks) if module.startswith("head") else number[module]

    return jax.tree_util.tree_map_with_path(depth, params)


def make_optimizer(
    learning_rate: Rate,
    *,
    name: str,
    weight_decay: NonNegative = 0.0,
    clip_norm: Positive | None = None,
    clip_value: Positive | None = None,
    clip_agc: Positive | None = None,
    layer_decay: Fraction | None = None,
    b1: Decay | None = None,
    b2: Decay | None = None,
    eps: NonNegative | None = None,
    momentum: Decay | None = None,
    max_grad_norm: Annotated[float, Range(above=0, at_most=math.inf)] | None = None,
    no_decay: Sequence[str] = NO_DECAY,
    freeze: Sequence[str] = (),
    blocks: Sequence[Sequence[str]] = (),
) -> Transformation:
    """Builds the optimizer: gradients -> clip -> `name` with masked weight decay -> updates to add.

    Frozen leaves (`trainable_mask`) get zero updates, have no state and do not count in the norm.

    Args:
      learning_rate: A float or a schedule of the step.
      name: adamw, lamb, lamb_timm, sgd, momentum, lion, adafactor or muon.
      weight_decay: Of the parameters that `decay_mask` marks.
      clip_norm: Clips the global norm of the gradients in front of the optimizer; None for no clip.
      clip_value: Clips every element of the gradients to this size instead.
      clip_agc: Clips each output channel's gradient to this multiple of its weights' norm (AGC, Brock et al. 2021).
      layer_decay: Multiplies the rate once for every block between a parameter and the head, see `depths`.
      b1: Decay of the first moment; None for the optimizer's own default, as for the four below.
      b2: Decay of the second moment (lion: of the momentum).
      eps: Added to the root of the second moment (adafactor: to the squared gradient).
      momentum: Of sgd, momentum and muon.
      max_grad_norm: Second clip of the global norm, of lamb_timm alone; inf for no clip.
      no_decay: Regexes of the paths of parameters that do not decay.
      freeze: Regexes of the paths of parameters that are not trained, such as '^backbone/' to train the head alone;
        their batch norms keep their statistics and normalise with them.
      blocks: Of the model, see `maxmap.models.block_paths`; only `layer_decay` needs them.

    Raises:
      UserError: An unknown name, an option that the optimizer does not take, or a value out of range.
    """
    check_arguments(make_optimizer, "optim", locals())
    if not callable(learning_rate):
        check("optim.learning_rate", learning_rate, NonNegative)
    options = _given(b1=b1, b2=b2, eps=eps, momentum=momentum, max_grad_norm=max_grad_norm)
    clips = _given(clip_norm=clip_norm, clip_value=clip_value, clip_agc=clip_agc)
    _check_options(name, options)
    if len(clips) > 1:
        raise UserError(f"optim has {' and '.join(clips)}: give one of them.")
    if layer_decay is not None and not blocks:
        raise UserError("optim.layer_decay needs the blocks of the model: give make_optimizer block_paths(model).")
    mask = functools.partial(decay_mask, no_decay=_check_patterns("no_decay", no_decay))
    freeze = _check_patterns("freeze", freeze)
    optimizer = OPTIMIZERS[name](learning_rate, weight_decay=weight_decay, mask=mask, **options)
    for key, value in clips.items():
        optimizer = optax.chain(CLIPS[key](value), optimizer)
    if layer_decay is not None:
        optimizer = optax.chain(optimizer, _scale_by_depth(layer_decay, blocks))
    return optax.partition(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: jax.tree.map(lambda trained: "trained" if trained else "frozen", trainable_mask(params, freeze)),
    )


def _lamb_timm(
    learning_rate: Rate,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    max_grad_norm: float = 1.0,
) -> Transformation:
    """LAMB as timm has it. The recipes of MAP, GA and CAFormer were tuned with it.

    It differs from `optax.lamb` in two points. It clips the global norm of the gradients at `max_grad_norm`. And only
    decayed tensors get the trust ratio |p| / |update| (1 if either is zero): norms, biases and layer scales take plain
    Adam steps. Without weight decay no tensor gets it.
    """
    steps = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    if math.isfinite(max_grad_norm):
        steps.insert(0, optax.clip_by_global_norm(max_grad_norm))
    if weight_decay:
        steps += [optax.add_decayed_weights(weight_decay, mask), optax.masked(optax.scale_by_trust_ratio(), mask)]
    return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))


def _sgd(
    learning_rate: Rate, weight_decay: float, mask: Mask, momentum: float = 0.9, *, nesterov: bool = True
) -> Transformation:
    decayed = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(decayed, optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov))


def _adafactor(learning_rate: Rate, weight_decay: float, mask: Mask, eps: float = 1e-30) -> Transformation:
    return optax.chain(
        optax.scale_by_factored_rms(epsilon=eps),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon(
    learning_rate: Rate,
    weight_decay: float,
    mask: Mask,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Transformation:
    def matrices(params: PyTree) -> PyTree:
        def axes(decays: bool, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
            return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if decays else None

        return jax.tree.map(axes, mask(params), params)

    return optax.contrib.muon(
        learning_rate,
        beta=momentum,
        eps=eps,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


def _clip_agc(clipping: float) -> Transformation:
    def mask(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(CLASSIFIER, _join(path)), params)

    return optax.masked(optax.adaptive_grad_clip(clipping), mask)


def _scale_by_depth(decay: float, blocks: Sequence[Sequence[str]]) -> Transformation:
    """Scales the finished updates, weight decay included, which equals a learning rate of its own for every leaf."""

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        del params
        return jax.tree.map(lambda u, depth: u * decay ** (len(blocks) - depth), updates, depths(updates, blocks))

    return optax.stateless(update)


CLIPS: dict[str, Callable[[float], Transformation]] = {
    "clip_norm": optax.clip_by_global_norm,
    "clip_value": optax.clip,
    "clip_agc": _clip_agc,
}

OPTIMIZERS: dict[str, Callable[..., Transformation]] = {
    "adamw": optax.adamw,
    "lamb": optax.lamb,
    "lamb_timm": _lamb_timm,
    "sgd": _sgd,
    "momentum": functools.partial(_sgd, nesterov=False),
    "lion": optax.lion,
    "adafactor": _adafactor,
    "muon": _muon,
}


# The options that not every optimizer has.
OPTIONS = {"b1", "b2", "eps", "momentum", "max_grad_norm"}


def _given(**values: float | None) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError unless there is such an optimizer, and it takes these options."""
    if name not in OPTIMIZERS:
        raise UserError(
            f"optim.name is {name!r}, which is not one of {sorted(OPTIMIZERS)}; "
            f"did you mean {nearest(name, OPTIMIZERS, 3)}?"
        )
    taken = sorted(inspect.signature(OPTIMIZERS[name]).parameters.keys() & OPTIONS)
    for key in options:
        if key not in taken:
            raise UserError(f"optim.{key} means nothing to {name!r}: leave it out, or give one of {taken}.")


def _check_patterns(key: str, patterns: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"optim.{key} holds {pattern!r}, which is not a regex: {error}.") from error
    return tuple(patterns)


def _join(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
