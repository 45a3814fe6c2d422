"""The training loss of a model with G branches (MAP, WACV 2025; Gramian attention, ICCV 2023).

With logits y_g and, where the head distils itself, y'_g::

    loss =                sum_g  base(y_g, targets)
         + distillation * sum_g  KL(stop_gradient(softmax(y_g)) || softmax(y'_g))        if the head gives y'
         + decorrelation * sum_g KL(stop_gradient(softmax(mean_g y)) || softmax(y_g))    if G > 1

The mean over g is a mean of logits. A negative `decorrelation` (-0.8 in the recipes) drives the branches apart.

Both published trainers divide each KL by B * K and not by B alone (`term_reduction="batch_class_mean"`). Binary
cross-entropy is a mean over B * K too, so its three terms have comparable sizes. Softmax cross-entropy is a mean over B
only, so both KL terms are K times weaker beside it: at K = 1000 they hardly count. `term_reduction="batch_mean"`
divides by B: the KL of the textbooks, K times larger. A weight tuned for one reduction is K times wrong for the other.

All losses are computed in float32 or wider, whatever the model computes in.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from maxmap.errors import UserError
from maxmap.operations import Array, upcast
from maxmap.ranges import NonNegative, Range, check_arguments


def softmax_cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean over the batch of -sum(targets * log_softmax(logits)).

    Args:
      logits: [B, K].
      targets: [B, K] dense; one-hot, smoothed or mixed. The rows need not sum to one.

    Returns:
      A scalar in nats.
    """
    logits = upcast(logits)
    return -jnp.mean(jnp.sum(targets.astype(logits.dtype) * jax.nn.log_softmax(logits), axis=-1))


def binary_cross_entropy(logits: Array, targets: Array, *, target_threshold: float | None = None) -> Array:
    """Mean over batch *and* classes of the K independent sigmoid cross-entropies.

    The form of "ResNet strikes back" (Wightman et al. 2021, arXiv:2110.00476).

    Args:
      logits: [B, K].
      targets: [B, K] dense, in [0, 1].
      target_threshold: if given, targets strictly above it become 1 and all others 0.

    Returns:
      A scalar in nats; the mean over K makes it about K times smaller than the sum over classes.
    """
    logits = upcast(logits)
    targets = targets.astype(logits.dtype)
    if target_threshold is not None:
        targets = (targets > target_threshold).astype(logits.dtype)
    # Two log-sigmoids rather than softplus(x) - x * t: the gradient of a saturated right answer does not cancel to 0.
    return -jnp.mean(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits))


def total_loss(
    outputs: Mapping[str, Array],
    targets: Array,
    *,
    name: Literal["softmax", "bce"] = "softmax",
    decorrelation: float = 0.0,
    distillation: NonNegative = 1.0,
    target_threshold: Annotated[float, Range(at_least=0, below=1)] | None = None,
    term_reduction: Literal["batch_class_mean", "batch_mean"] = "batch_class_mean",
) -> tuple[Array, dict[str, Array]]:
    """Computes the training loss; the formula stands at the top of this file.

    Args:
      outputs: 'logits' `[G, B, K]` and, while training with self-distillation, 'distill' `[G, B, K]`.
      targets: `[B, K]` dense, label smoothing included.
      name: The base loss, softmax cross-entropy or binary cross-entropy.
      decorrelation: Weight of the decorrelation term; without effect on a single branch.
      distillation: Weight of the self-distillation term; without effect on a head that gives no 'distill'.
      target_threshold: Makes targets above it 1 and all others 0, for 'bce' only; None for off.
      term_reduction: How the two KL terms are averaged.

    Returns:
      The loss and its parts, all scalars: 'loss' = 'base' + 'distillation' + 'decorrelation', weights included.

    Raises:
      UserError: A value is out of range, or the base loss takes no threshold.
      ValueError: The shapes of logits and targets do not fit.
    """
    check_arguments(total_loss, "loss", locals())
    if target_threshold is not None and name != "bce":
        raise UserError(f"loss.target_threshold belongs to name='bce': leave it out with name={name!r}.")

    logits = upcast(outputs["logits"])  # [G, B, K]
    if logits.ndim != 3 or logits.shape[1:] != targets.shape:
        raise ValueError(f"logits must be [G, B, K] and targets [B, K], not {logits.shape} and {targets.shape}")

    def base(branch: Array) -> Array:
        if name == "bce":
            return binary_cross_entropy(branch, targets, target_threshold=target_threshold)
        return softmax_cross_entropy(branch, targets)

    zero = jnp.zeros((), logits.dtype)
    parts = {"base": jnp.sum(jax.vmap(base)(logits)), "distillation": zero, "decorrelation": zero}
    if "distill" in outputs and distillation:
        students = upcast(outputs["distill"])
        parts["distillation"] = distillation * _divergence(logits, students, term_reduction)
    if logits.shape[0] > 1 and decorrelation:
        consensus = jnp.mean(logits, axis=0, keepdims=True)  # [1, B, K]
        parts["decorrelation"] = decorrelation * _divergence(consensus, logits, term_reduction)
    loss = parts["base"] + parts["distillation"] + parts["decorrelation"]
    return loss, {"loss": loss, **parts}


def _divergence(teachers: Array, students: Array, reduction: str) -> Array:
    """Sum over branches of KL(teacher || student), averaged as `reduction` says; no gradient into the teachers."""
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teachers))
    log_q = jax.nn.log_softmax(students)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)  # [G, B]
    total = jnp.sum(jnp.mean(divergence, axis=-1))
    return total / students.shape[-1] if reduction == "batch_class_mean" else total
