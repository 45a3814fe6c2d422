"""The training loss of a model with G branches (MAP, WACV 2025; Gramian attention, ICCV 2023).

With logits y_g and, where the head distils itself, y'_g:

    loss =                sum_g  base(y_g, targets)
         + distillation * sum_g  KL(stop_gradient(softmax(y_g)) || softmax(y'_g))        if the head gives y'
         + decorrelation * sum_g KL(stop_gradient(softmax(mean_g y)) || softmax(y_g))    if G > 1

The mean over g is a mean of logits. A negative `decorrelation` (-0.8 in the recipes) drives the branches apart. Where
outputs are no classes of which one is right, the KL is another (`DIVERGENCES`): of K independent yes-or-no answers, or
of K normal distributions of variance 1, which is half the squared difference.

Both published trainers divide each KL by B * K and not by B alone (`term_reduction="batch_class_mean"`). Binary
cross-entropy is a mean over B * K too, so its three terms have comparable sizes. Softmax cross-entropy is a mean over B
only, so both KL terms are K times weaker beside it: at K = 1000 they hardly count. `term_reduction="batch_mean"`
divides by B: the KL of the textbooks, K times larger. A weight tuned for one reduction is K times wrong for the other.

All losses are computed in float32 or wider, whatever the model computes in.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax

from maxmap.errors import UserError
from maxmap.layers.pooling import bilinear
from maxmap.metrics import IGNORED
from maxmap.operations import Array, upcast
from maxmap.ranges import NonNegative, Range, check_arguments


def softmax_cross_entropy(logits: Array, targets: Array, weights: Array | None = None) -> Array:
    """Mean over the batch of -sum(weights * targets * log_softmax(logits)).

    Args:
      logits: [B, K].
      targets: [B, K] dense; one-hot, smoothed or mixed. The rows need not sum to one.
      weights: [K], of the classes; None for 1. The mean is over B, not over the weights.

    Returns:
      A scalar in nats.
    """
    logits = upcast(logits)
    terms = targets.astype(logits.dtype) * jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(_weighted(terms, weights), axis=-1))


def pixel_cross_entropy(logits: Array, masks: Array, weights: Array | None = None) -> Array:
    """Mean over the pixels that count of -weights[class] * log_softmax(logits)[class].

    The logits are resized to the masks, not the masks to the logits.

    Args:
      logits: [B, h, w, K].
      masks: int [B, H, W], with `maxmap.metrics.IGNORED` where a pixel does not count.
      weights: [K], of the classes; None for 1. The mean is over pixels, not over weights.

    Returns:
      A scalar in nats; 0 where no pixel counts.
    """
    log_p = jax.nn.log_softmax(bilinear(upcast(logits), masks.shape[1:]))
    counts = masks != IGNORED
    own = jnp.take_along_axis(_weighted(log_p, weights), jnp.where(counts, masks, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counts, own, 0)) / jnp.maximum(jnp.sum(counts), 1)


def binary_cross_entropy(
    logits: Array, targets: Array, weights: Array | None = None, *, target_threshold: float | None = None
) -> Array:
    """Mean over batch *and* classes of the K independent sigmoid cross-entropies.

    The form of "ResNet strikes back" (Wightman et al. 2021, arXiv:2110.00476).

    Args:
      logits: [B, K].
      targets: [B, K] dense, in [0, 1].
      weights: [K], of the right answers: what a target of 1 counts beside a target of 0; None for 1.
      target_threshold: if given, targets strictly above it become 1 and all others 0.

    Returns:
      A scalar in nats; the mean over K makes it about K times smaller than the sum over classes.
    """
    logits = upcast(logits)
    targets = targets.astype(logits.dtype)
    if target_threshold is not None:
        targets = (targets > target_threshold).astype(logits.dtype)
    # Two log-sigmoids rather than softplus(x) - x * t: the gradient of a saturated right answer does not cancel to 0.
    right = _weighted(targets * jax.nn.log_sigmoid(logits), weights)
    return -jnp.mean(right + (1 - targets) * jax.nn.log_sigmoid(-logits))


def _weighted(terms: Array, weights: Array | None) -> Array:
    if weights is None:
        return terms
    return terms * jnp.asarray(weights, terms.dtype).reshape((1,) * (terms.ndim - 1) + (-1,))


def earth_movers_distance(logits: Array, targets: Array) -> Array:
    """Mean over the batch of the distance between two distributions over ordered scores, with squared steps.

    It is the root of the mean over K of the squared differences of the cumulative distributions, equation 1 of NIMA
    with r = 2 (Talebi and Milanfar 2018, arXiv:1709.05424).

    Args:
      logits: [B, K], whose softmax is the one distribution.
      targets: [B, K], the other; the rows sum to one.

    Returns:
      A scalar, from 0 to 1.
    """
    logits = upcast(logits)
    difference = jnp.cumsum(jax.nn.softmax(logits) - targets.astype(logits.dtype), axis=-1)
    square = jnp.mean(jnp.square(difference), axis=-1)  # [B]
    differs = square > 0  # where nothing differs the root has no gradient, and 0 is right
    return jnp.mean(jnp.where(differs, jnp.sqrt(jnp.where(differs, square, 1)), 0))


def mean_squared_error(values: Array, targets: Array) -> Array:
    """Mean over batch and columns of the squared differences of two arrays [B, K]."""
    return jnp.mean(jnp.square(upcast(values) - targets))


def huber(values: Array, targets: Array) -> Array:
    """Mean over batch and columns of d^2 / 2 up to a difference d of 1, and d - 1/2 above (Huber 1964)."""
    return jnp.mean(optax.huber_loss(upcast(values), targets))


# The losses that have no options.
_OTHERS: dict[str, Callable[[Array, Array], Array]] = {
    "emd": earth_movers_distance,
    "mse": mean_squared_error,
    "huber": huber,
}


def total_loss(
    outputs: Mapping[str, Array],
    targets: Array,
    *,
    weights: Array | None = None,
    divergence: Literal["categorical", "binary", "normal"] = "categorical",
    name: Literal["softmax", "bce", "emd", "mse", "huber"] = "softmax",
    decorrelation: float = 0.0,
    distillation: NonNegative = 1.0,
    target_threshold: Annotated[float, Range(at_least=0, below=1)] | None = None,
    term_reduction: Literal["batch_class_mean", "batch_mean"] = "batch_class_mean",
    auxiliary: NonNegative = 0.4,
) -> tuple[Array, dict[str, Array]]:
    """Computes the training loss; the formula stands at the top of this file.

    Args:
      outputs: 'logits' `[G, B, K]` and, while training with self-distillation, 'distill' `[G, B, K]`; or of pixels
        'logits' `[G, B, h, w, K]` and, while training, 'auxiliary' `[G, B, h', w', K]`.
      targets: `[B, K]` dense, label smoothing included; or masks int `[B, H, W]`.
      weights: `[K]`, of the classes, for 'softmax' and 'bce' only; None for 1.
      divergence: A key of `DIVERGENCES`: what the outputs stand for in the two KL terms.
      name: The base loss: softmax or binary cross-entropy, the earth mover's distance of distributions over ordered
        scores ('emd'), the squared error or Huber's of numbers.
      decorrelation: Weight of the decorrelation term; without effect on a single branch.
      distillation: Weight of the self-distillation term; without effect on a head that gives no 'distill'.
      target_threshold: Makes targets above it 1 and all others 0, for 'bce' only; None for off.
      term_reduction: How the two KL terms are averaged.
      auxiliary: Weight of the second classifier of a head that classifies pixels; without effect on other heads.

    Returns:
      The loss and its parts, all scalars: 'loss' = 'base' + 'distillation' + 'decorrelation', weights included; of
      pixels, for which there is softmax cross-entropy alone, 'loss' = 'base' + 'auxiliary'.

    Raises:
      UserError: A value is out of range, or the base loss takes no threshold.
      ValueError: The shapes of logits and targets do not fit.
    """
    check_arguments(total_loss, "loss", locals())
    if target_threshold is not None and name != "bce":
        raise UserError(f"loss.target_threshold belongs to name='bce': leave it out with name={name!r}.")
    if weights is not None and name in _OTHERS:
        raise UserError(f"data.class_weights belongs to loss.name 'softmax' or 'bce': leave it out with {name!r}.")

    logits = upcast(outputs["logits"])  # [G, B, K]
    if logits.ndim == 5 and targets.ndim == 3 and name == "softmax":
        return _pixel_loss(logits, outputs.get("auxiliary"), targets, weights, auxiliary)
    if logits.ndim != 3 or logits.shape[1:] != targets.shape:
        raise ValueError(f"logits must be [G, B, K] and targets [B, K], not {logits.shape} and {targets.shape}")

    def base(branch: Array) -> Array:
        if name == "bce":
            return binary_cross_entropy(branch, targets, weights, target_threshold=target_threshold)
        if name == "softmax":
            return softmax_cross_entropy(branch, targets, weights)
        return _OTHERS[name](branch, targets)

    zero = jnp.zeros((), logits.dtype)
    parts = {"base": jnp.sum(jax.vmap(base)(logits)), "distillation": zero, "decorrelation": zero}
    if "distill" in outputs and distillation:
        students = upcast(outputs["distill"])
        parts["distillation"] = distillation * _mean_divergence(logits, students, divergence, term_reduction)
    if logits.shape[0] > 1 and decorrelation:
        consensus = jnp.mean(logits, axis=0, keepdims=True)  # [1, B, K]
        parts["decorrelation"] = decorrelation * _mean_divergence(consensus, logits, divergence, term_reduction)
    loss = parts["base"] + parts["distillation"] + parts["decorrelation"]
    return loss, {"loss": loss, **parts}


def _pixel_loss(
    logits: Array, second: Array | None, masks: Array, weights: Array | None, auxiliary: float
) -> tuple[Array, dict[str, Array]]:
    def over_branches(logits: Array) -> Array:
        return jnp.sum(jax.vmap(lambda branch: pixel_cross_entropy(branch, masks, weights))(logits))

    parts = {"base": over_branches(logits), "auxiliary": jnp.zeros((), logits.dtype)}
    if second is not None and auxiliary:
        parts["auxiliary"] = auxiliary * over_branches(second)
    loss = parts["base"] + parts["auxiliary"]
    return loss, {"loss": loss, **parts}


def teacher_loss(logits: Array, taught: Array, name: str, divergence: str, temperature: float) -> Array:
    """Computes how far a student is from another network, softened: the sum over its branches g of

        temperature^2 * KL(softmax(taught / temperature) || softmax(y_g / temperature)),

    whose factor keeps the gradients about as large at any temperature (Hinton et al. 2015, arXiv:1503.02531, section 2;
    DeiT, arXiv:2012.12877, equation 2). It is averaged as the base loss is, so that the two weigh against each other:
    over B, or with 'bce' over B * K. DeiT's code divides by B * K beside a cross-entropy over B, its equation does not.

    Args:
      logits: `[G, B, K]` of the student.
      taught: `[B, K]` of the teacher, which gets no gradient.
      name: Of the base loss.
      divergence: A key of `DIVERGENCES`.
      temperature: Above 0; at 1 the answers count as they are.

    Returns:
      A scalar in nats.
    """
    students, teachers = upcast(logits) / temperature, upcast(taught)[None] / temperature
    reduction = "batch_class_mean" if name == "bce" else "batch_mean"
    return temperature**2 * _mean_divergence(teachers, students, divergence, reduction)


def _mean_divergence(teachers: Array, students: Array, divergence: str, reduction: str) -> Array:
    """Sum over branches of KL(teacher || student), averaged as `reduction` says; no gradient into the teachers."""
    terms = DIVERGENCES[divergence](jax.lax.stop_gradient(teachers), students)  # [G, B, K]
    total = jnp.sum(jnp.mean(jnp.sum(terms, axis=-1), axis=-1))
    return total / students.shape[-1] if reduction == "batch_class_mean" else total


def _categorical(teachers: Array, students: Array) -> Array:
    log_p, log_q = jax.nn.log_softmax(teachers), jax.nn.log_softmax(students)
    return jnp.exp(log_p) * (log_p - log_q)


def _binary(teachers: Array, students: Array) -> Array:
    def side(sign: int) -> Array:
        log_p, log_q = jax.nn.log_sigmoid(sign * teachers), jax.nn.log_sigmoid(sign * students)
        return jnp.exp(log_p) * (log_p - log_q)

    return side(1) + side(-1)


def _normal(teachers: Array, students: Array) -> Array:
    return jnp.square(teachers - students) / 2


# The terms over K of KL(teacher || student), by what outputs stand for.
DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
    "categorical": _categorical,
    "binary": _binary,
    "normal": _normal,
}
