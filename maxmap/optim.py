"""Optimizers by name, and which parameters they decay and train; composed from optax."""

import inspect
import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
import optax.contrib

from maxmap.errors import UserError, nearest

PyTree = Any
Mask = Callable[[PyTree], PyTree]

# Searched in paths such as 'backbone/stages_0/blocks_1/attn_block/attn/rel_pos/relative_position_bias_table'.
# The last two must be whole leaf names: FasterViT has position MLPs below 'pos_embed/', and those are decayed.
NO_DECAY = (
    r"(^|/)relative_position_bias_table$",
    r"(^|/)rel_pos/mlp/",
    r"(^|/)pos_embed$",
    r"(^|/)cls_token$",
)
# The classifiers of the three heads, which adaptive clipping leaves alone.
CLASSIFIER = r"^head/(fc|heads|self_dt_heads)(_\d+)?/"
FROZEN = r"(^|/)random_matrix$"  # RandFormer's token mixers: drawn once, never trained


def decay_mask(params: PyTree, no_decay: Sequence[str] = NO_DECAY) -> PyTree:
    """Marks what weight decay applies to: leaves of two or more axes that are no bias and match no `no_decay` regex.

    These are the groups of timm for every model here, so norm scales, layer scales, biases, relative position
    tables (and the MLPs that stand for them in timm's MaxxViT), absolute position embeddings and class tokens are
    left out.

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


def trainable_mask(params: PyTree) -> PyTree:
    """Marks what is trained: everything but RandFormer's frozen random matrices. Same tree, a bool for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(FROZEN, _join(path)), params)


# Where the blocks of a backbone lie: (stage, block), or (block,) in a network without stages.
_BLOCKS = (
    r"backbone/(?:stages|levels|transformers)_(\d+)/blocks_(\d+)/",
    r"backbone/(?:layer|stage)(\d+)_(\d+)/",  # ResNet, CSWin
    r"backbone/layers_(\d+)_(\d+)_",  # MobileNet
    r"backbone/blocks_(\d+)/",  # ViT
)
_STARTS_STAGE = r"backbone/(?:stages|transformers)_(\d+)/"  # a downsampling layer, in front of the first block
_ENDS_STAGE = r"backbone/(?:levels_|merge)(\d+)/"  # FasterViT's and CSWin's, behind the last one


def depths(params: PyTree) -> PyTree:
    """Numbers the leaves from the input to the output for layer-wise decay of the learning rate.

    0 is the stem with position embeddings and tokens, 1 to N the backbone's blocks in order, each with the downsampling
    layer in front of it, and N + 1 the head. timm counts blocks too for most families, but stages for MaxViT.

    Args:
      params: nested dicts; leaves are looked at by their path only.

    Returns:
      The same tree with an int for every leaf.
    """

    def place(path: tuple) -> tuple[int, ...]:
        name = _join(path)
        if name.startswith("head/"):
            return (2,)
        for pattern in _BLOCKS:
            if match := re.match(pattern, name):
                return (1, *(int(number) for number in match.groups()))
        if match := re.match(_STARTS_STAGE, name):
            return (1, int(match[1]), 0)
        if match := re.match(_ENDS_STAGE, name):
            return (1, int(match[1]) + 1, 0)
        return (0,)

    places = jax.tree_util.tree_map_with_path(lambda path, _: place(path), params)
    is_place = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    blocks = {found for found in jax.tree.leaves(places, is_leaf=is_place) if found[0] == 1}
    number = {(0,): 0, **{found: i + 1 for i, found in enumerate(sorted(blocks))}, (2,): len(blocks) + 1}
    return jax.tree.map(lambda found: number[found], places, is_leaf=is_place)


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    name: str,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    clip_agc: float | None = None,
    layer_decay: float | None = None,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    max_grad_norm: float | None = None,
    no_decay: Sequence[str] = NO_DECAY,
) -> optax.GradientTransformation:
    """Builds the optimizer: gradients -> clip -> `name` with masked weight decay -> updates to add.

    Frozen leaves (`trainable_mask`) get zero updates, have no state and do not count in the norm that clips.

    An option left at None takes the default of the optimizer; one that the optimizer lacks is an error.

    ==========  ==========================================================================================
    adamw       b1 0.9, b2 0.999, eps 1e-8. Decoupled decay times the rate, as torch's (Loshchilov and Hutter 2019).
    lamb        b1 0.9, b2 0.999, eps 1e-6. optax's: every tensor gets a trust ratio (You et al. 2020).
    lamb_timm   b1 0.9, b2 0.999, eps 1e-6, max_grad_norm 1 (inf: off). timm's: see `_lamb_timm`.
    sgd         momentum 0.9, Nesterov. Decay is added to the gradient, as torch's.
    lion        b1 0.9, b2 0.99. Decoupled decay (Chen et al. 2023).
    adafactor   eps 1e-30. Factored moments, update clipped at RMS 1, scaled by the RMS of the parameter (Shazeer and
                Stern 2018). Unlike in `optax.adafactor`, decay is times the learning rate, as for all the others.
    muon        momentum 0.95, b1 0.9, b2 0.999, eps 1e-8. Every decayed tensor as a matrix [rest, last axis], scaled
                to the size of an AdamW update (Liu et al. 2025); Nesterov Adam for the others.
    ==========  ==========================================================================================

    Args:
      learning_rate: a float or a schedule of the step.
      name: one of the above.
      weight_decay: applied to `decay_mask(params, no_decay)`.
      clip_norm: clips the global norm of all gradients before the optimizer sees them; None for not. torch's
        `clip_grad_norm_` adds 1e-6 to the norm, this does not.
      clip_value: clips every element of the gradients to this size instead.
      clip_agc: clips every unit's gradient to this multiple of its weights' norm instead (adaptive gradient clipping,
        Brock et al. 2021), classifiers left alone; a unit is an output channel.
      layer_decay: the rate of a leaf is times this to the power of its distance from the head, see `depths`.
      b1: decay of the first moment.
      b2: decay of the second moment (lion: of its momentum).
      eps: added to the root of the second moment (adafactor: to the squared gradient).
      momentum: of sgd and muon.
      max_grad_norm: lamb_timm's own clip, after `clip_norm`.
      no_decay: replaces the path regexes of `decay_mask`.

    Raises:
      UserError: for an unknown name, an option that the optimizer does not take, or a value out of range.
    """
    if name not in OPTIMIZERS:
        raise UserError(
            f"optim.name is {name!r}, which is not one of {sorted(OPTIMIZERS)}; "
            f"did you mean {nearest(name, OPTIMIZERS, 3)}?"
        )
    build = OPTIMIZERS[name]
    given = {"b1": b1, "b2": b2, "eps": eps, "momentum": momentum, "max_grad_norm": max_grad_norm}
    options = {key: value for key, value in given.items() if value is not None}
    taken = sorted(inspect.signature(build).parameters.keys() & given.keys())
    for key in options:
        if key not in taken:
            raise UserError(f"optim.{key} means nothing to {name!r}: leave it out, or give one of {taken}.")
    for key in options.keys() & {"b1", "b2", "momentum"}:
        _check(key, options[key], "in [0, 1)", lambda value: 0 <= value < 1)
    for key in options.keys() & {"max_grad_norm"}:
        _check(key, options[key], "above 0 (inf for no clip)", lambda value: value > 0)
    for key in options.keys() & {"eps"}:
        _check(key, options[key], "of at least 0", lambda value: 0 <= value < math.inf)
    _check("weight_decay", weight_decay, "of at least 0", lambda value: 0 <= value < math.inf)
    wanted = {"clip_norm": clip_norm, "clip_value": clip_value, "clip_agc": clip_agc}
    clips = {key: value for key, value in wanted.items() if value is not None}
    if len(clips) > 1:
        raise UserError(f"optim has {' and '.join(clips)}: give one of them.")
    for key, value in clips.items():
        _check(key, value, "above 0 (or leave it out for no clip)", lambda value: value > 0)
    if layer_decay is not None:
        _check("layer_decay", layer_decay, "above 0 and at most 1", lambda value: 0 < value <= 1)
    if not callable(learning_rate):
        _check("learning_rate", learning_rate, "of at least 0", lambda value: 0 <= value < math.inf)

    no_decay = _check_patterns(no_decay)
    optimizer = build(learning_rate, weight_decay=weight_decay, mask=lambda p: decay_mask(p, no_decay), **options)
    for key, value in clips.items():
        optimizer = optax.chain(CLIPS[key](value), optimizer)
    if layer_decay is not None:
        optimizer = optax.chain(optimizer, _scale_by_depth(layer_decay))
    return optax.partition(
        {"trained": optimizer, "frozen": optax.set_to_zero()},
        lambda params: jax.tree.map(lambda trained: "trained" if trained else "frozen", trainable_mask(params)),
    )


def _adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


def _lamb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    return optax.lamb(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)


def _lamb_timm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """LAMB as timm runs it, and so as the recipes of MAP, GA and CAFormer were tuned.

    It differs from `optax.lamb` in two points: the global gradient norm is clipped at `max_grad_norm`, and only decayed
    tensors get the trust ratio |p| / |update| (1 if either is zero), so norms, biases and layer scales take plain Adam
    steps. Without weight decay no tensor gets it.
    """
    steps = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    if math.isfinite(max_grad_norm):
        steps.insert(0, optax.clip_by_global_norm(max_grad_norm))
    if weight_decay:
        steps += [optax.add_decayed_weights(weight_decay, mask), optax.masked(optax.scale_by_trust_ratio(), mask)]
    return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))


def _sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    mask: Mask,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    decayed = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(decayed, optax.sgd(learning_rate, momentum=momentum, nesterov=True))


def _lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    mask: Mask,
    b1: float = 0.9,
    b2: float = 0.99,
) -> optax.GradientTransformation:
    return optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)


def _adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    mask: Mask,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(epsilon=eps),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    mask: Mask,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
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


def _clip_agc(clipping: float) -> optax.GradientTransformation:
    def mask(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: not re.search(CLASSIFIER, _join(path)), params)

    return optax.masked(optax.adaptive_grad_clip(clipping), mask)


def _scale_by_depth(decay: float) -> optax.GradientTransformation:
    """Scales the finished updates, decay of weights included, as a rate of its own for every leaf does."""

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        del params
        numbers_of = depths(updates)
        head = max(jax.tree.leaves(numbers_of))
        return jax.tree.map(lambda u, number: u * decay ** (head - number), updates, numbers_of)

    return optax.stateless(update)


CLIPS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "clip_norm": optax.clip_by_global_norm,
    "clip_value": optax.clip,
    "clip_agc": _clip_agc,
}

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "lamb_timm": _lamb_timm,
    "sgd": _sgd,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
}


def _check(key: str, value: Any, wanted: str, is_right: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not is_right(float(value)):
        raise UserError(f"optim.{key} is {value!r}: give a number {wanted}.")


def _check_patterns(no_decay: Sequence[str]) -> tuple[str, ...]:
    if isinstance(no_decay, str):
        raise UserError(f"optim.no_decay is the text {no_decay!r}: give a list of regexes.")
    for pattern in no_decay:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"optim.no_decay holds {pattern!r}, which is not a regex: {error}.") from error
    return tuple(no_decay)


def _join(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
