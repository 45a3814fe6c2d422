"""Batch norms whose parameters enter operations that compute several layers at once."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from maxmap.layers.parameters import parameter
from maxmap.operations import Array, upcast


def fold_batch_norm(mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array]:
    """Factor and summand of a batch norm, all arrays `[C]`, in float32 or wider."""
    factor = lax.rsqrt(var + epsilon) * upcast(scale)
    return factor, upcast(bias) - mean * factor


class FoldedBatchNorm(nn.Module):
    """What a `BatchNorm` keeps, for operations that fuse it and know its input's moments; see `fold_batch_norm`.

    Parameters and running statistics are those of a `BatchNorm`, under the same names.

    Attributes:
      channels: of the input.
      momentum: see `BatchNorm`.
    """

    channels: int
    momentum: float = 0.9

    def setup(self) -> None:
        """Declares what `BatchNorm` declares."""
        self.scale = parameter(self, "scale", nn.initializers.ones, (self.channels,))
        self.bias = parameter(self, "bias", nn.initializers.zeros, (self.channels,))
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, (self.channels,), jnp.float32)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, (self.channels,), jnp.float32)

    def near(self) -> Array:
        """The running mean `[C]`, near which the input's mean is."""
        return self.running_mean.value

    def fold(self, epsilon: float) -> tuple[Array, Array]:
        """Factor and summand `[C]` by the running statistics, in float32 or wider."""
        return fold_batch_norm(self.running_mean.value, self.running_var.value, self.scale, self.bias, epsilon)

    def follow(self, mean: Array, var: Array, count: int) -> None:
        """Updates the running statistics.

        Args:
          mean: of the input over `count` values, `[C]`, in float32 or wider.
          var: biased variance, `[C]`.
          count: number of values.
        """
        unbiased = var * (count / max(count - 1, 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.value = self.momentum * running.value + (1 - self.momentum) * lax.stop_gradient(new)
