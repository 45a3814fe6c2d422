"""Published blocks that several families or heads share; each names its paper."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax.core import FrozenDict

from maxmap.fused import fuses_mlp
from maxmap.layers.padding import next_multiple, pad_map, real_pixels
from maxmap.layers.parameters import parameter
from maxmap.layers.primitives import (
    ACTIVATIONS,
    TRUNC_NORMAL,
    BatchNorm,
    Block,
    Conv,
    DropPath,
    Initializer,
    LayerNorm,
    Linear,
    spatial_mean,
)
from maxmap.layers.residual import Compute, mlp_weights, residual_mlp, unweighted
from maxmap.operations import Array, attention, convolve_beside, linear


class Mlp(nn.Module):
    """Two linear maps of the last axis with an activation between them.

    Attributes:
      hidden: channels between the two maps.
      channels: output channels.
      activation: between the two maps.
      inits: 'kernel_init' and 'bias_init' of both maps; PyTorch's defaults for what is not given.
      layer: `Linear`, or `Conv` where the reference keeps 4-d weights.
      hidden_dropout: rate of dropping values after the activation.
      dropout: the same for the output.
    """

    hidden: int
    channels: int
    activation: str = "gelu"
    inits: Mapping[str, Initializer] = FrozenDict()
    layer: Callable[..., nn.Module] = Linear
    hidden_dropout: float = 0.0
    dropout: float = 0.0

    @nn.nowrap
    def fuses(self, x: Array, *, train: bool) -> bool:
        """Whether a kernel can compute the MLP together with what stands around it, see `residual_mlp`."""
        return not (train and (self.hidden_dropout or self.dropout)) and fuses_mlp(x, self.hidden)

    @nn.compact
    def __call__(self, x: Array, *, train: bool, compute: Compute | None = None) -> Array:
        """Maps `[..., C]` to `[..., channels]`; `compute` does it instead, given the activation and the weights."""
        fc1, fc2 = (
            self.layer(self.hidden, name="fc1", **self.inits),
            self.layer(self.channels, name="fc2", **self.inits),
        )
        if compute is not None:
            return compute(unweighted(self.activation), mlp_weights(fc1, fc2, x.shape[-1]))
        x = ACTIVATIONS[self.activation](fc1(x))
        x = nn.Dropout(self.hidden_dropout)(x, deterministic=not train)
        return nn.Dropout(self.dropout)(fc2(x), deterministic=not train)


class ConvNormAct(nn.Module):
    """Convolution, then a batch norm and an activation, each of which can be left out.

    Attributes:
      channels: output channels.
      kernel_size: of both axes, odd; the zeros around the map keep its size at stride 1.
      stride: of both axes.
      groups: of channels.
      activation: a key of `ACTIVATIONS`; None for none.
      bias: of the convolution.
      norm: name of the batch norm; None for none.
      epsilon: of the batch norm.
      inits: 'kernel_init' and 'bias_init' of the convolution; PyTorch's defaults for what is not given.
      scale_init: of the batch norm's scale.
    """

    channels: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    activation: str | None = None
    bias: bool = False
    norm: str | None = "bn"
    epsilon: float = 1e-5
    inits: Mapping[str, Initializer] = FrozenDict()
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, channels]`, rounded up."""
        conv = functools.partial(Conv, padding=self.kernel_size // 2, groups=self.groups, bias=self.bias, name="conv")
        x = conv(self.channels, self.kernel_size, self.stride, **self.inits)(x)
        if self.norm is not None:
            norm = BatchNorm(self.epsilon, scale_init=self.scale_init, name=self.norm)
            return norm(x, train=train, activation=self.activation)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)


class Residual(Block):
    """A branch on a residual path, with stochastic depth.

    Attributes:
      branch: constructor of the branch.
      drop_path: rate of dropping it.
      part: name of the branch's submodule.
    """

    branch: Callable[..., nn.Module]
    drop_path: float
    part: str

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        return x + DropPath(self.drop_path)(self.branch(name=self.part)(x, train=train), train=train)


class GroupedMlp(nn.Module):
    """Two grouped 1x1 convolutions of a map with an activation and a channel shuffle between them.

    Attributes:
      groups: of both convolutions.
      ratio: hidden channels divided by the input's.
      activation: between the convolutions.
      dropout: after the activation.
      inits: 'kernel_init' and 'bias_init' of both convolutions; PyTorch's defaults for what is not given.
    """

    groups: int
    ratio: float = 4.0
    activation: str = "gelu"
    dropout: float = 0.0
    inits: Mapping[str, Initializer] = FrozenDict()

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        conv = functools.partial(Conv, groups=self.groups, **self.inits)
        hidden = ACTIVATIONS[self.activation](conv(int(self.ratio * x.shape[-1]), name="fc1")(x))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
        return conv(x.shape[-1], name="fc2")(channel_shuffle(hidden, self.groups))


def channel_shuffle(x: Array, groups: int) -> Array:
    """Reorders C channels in g groups: `y[j * C/g + i] = x[i * g + j]`, as the released MAP and GA heads do."""
    return rearrange(x, "... (c g) -> ... (g c)", g=groups)


class PatchEmbed(nn.Module):
    """Linear map of square patches, which overlap if the stride is smaller than the patches.

    Attributes:
      channels: output channels.
      patch_size: side of the patches.
      stride: between patches.
      projection: name of the convolution.
    """

    channels: int
    patch_size: int
    stride: int
    projection: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Conv(self.channels, self.patch_size, stride=self.stride, name=self.projection)(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention. The output of the fused projection is ordered (qkv, heads, head_dim).

    Attributes:
      heads: of the attention; they divide the channels.
      inits: 'kernel_init' and 'bias_init' of both projections; PyTorch's defaults for what is not given.
      position_bias: constructor of a named submodule that returns a bias of the logits, `[heads, N, N]`.
      attn_drop: dropout of the attention probabilities.
      proj_drop: dropout of the output.
      qkv_bias: of the fused projection.
    """

    heads: int
    inits: Mapping[str, Initializer] = FrozenDict()
    position_bias: Callable[[], nn.Module] | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    qkv_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, keys: Array | None = None) -> Array:
        """Maps tokens `[B, N, C]` to `[B, N, C]`; `keys` are those that count, see `maxmap.operations.attention`."""
        channels = x.shape[-1]
        qkv = Linear(3 * channels, bias=self.qkv_bias, name="qkv", **self.inits)(x)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        bias = None if self.position_bias is None else self.position_bias()()
        dropout = nn.Dropout(self.attn_drop, deterministic=False)
        x = rearrange(
            attention(q * q.shape[-1] ** -0.5, k, v, bias, dropout if train and self.attn_drop else None, keys),
            "b h n d -> b n (h d)",
        )
        x = Linear(channels, name="proj", **self.inits)(x)
        return nn.Dropout(self.proj_drop)(x, deterministic=not train)


class ViTBlock(Block):
    """Self-attention and an MLP, each behind a LayerNorm and with a residual (Dosovitskiy et al. 2021).

    Attributes:
      heads: of the attention.
      mlp_ratio: hidden channels of the MLP divided by the tokens' channels.
      drop_path: rate of dropping each residual branch.
      inits: 'kernel_init' and 'bias_init' of all linear maps; PyTorch's defaults for what is not given.
      attn_drop: dropout of the attention probabilities.
      proj_drop: dropout of the attention's output and inside of the MLP.
      activation: of the MLP.
      epsilon: of the norms.
    """

    heads: int
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    inits: Mapping[str, Initializer] = FrozenDict()
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    activation: str = "gelu"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        """Maps tokens `[B, N, C]` to `[B, N, C]`."""
        channels = x.shape[-1]
        attention = SelfAttention(
            self.heads, self.inits, attn_drop=self.attn_drop, proj_drop=self.proj_drop, name="attn"
        )
        mlp = Mlp(
            int(self.mlp_ratio * channels),
            channels,
            self.activation,
            self.inits,
            hidden_dropout=self.proj_drop,
            dropout=self.proj_drop,
            name="mlp",
        )
        y = attention(LayerNorm(self.epsilon, name="norm1")(x), train=train)
        x = x + DropPath(self.drop_path)(y, train=train)
        y = mlp(LayerNorm(self.epsilon, name="norm2")(x), train=train)
        return x + DropPath(self.drop_path)(y, train=train)


def relative_index(window: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets query - key of all pairs of positions of a window, plus what makes the least offset zero.

    Args:
      window: height and width.

    Returns:
      Vertical and horizontal offsets, both `[N, N]` (query, key), N = height * width in row-major order.
    """
    h, w = window
    y, x = np.divmod(np.arange(h * w), w)
    return y[:, None] - y[None] + h - 1, x[:, None] - x[None] + w - 1


def squeeze_gate(mean: Array, *parameters: Array, activation: str) -> Array:
    """The gate of a `SqueezeExcite`.

    Args:
      mean: of the maps, `[B, C]`.
      *parameters: kernel `[1, 1, I, O]` and bias `[O]` of the two convolutions.
      activation: between them.

    Returns:
      `[B, C]`, in the type of `mean`.
    """
    kernel, bias, out_kernel, out_bias = (leaf.astype(mean.dtype) for leaf in parameters)
    hidden = ACTIVATIONS[activation](linear(mean, kernel[0, 0], bias))
    return nn.sigmoid(linear(hidden, out_kernel[0, 0], out_bias))


class SqueezeExciteParameters(nn.Module):
    """The parameters of a `SqueezeExcite`, under the same names, for operations that fuse it; see `squeeze_gate`.

    Attributes:
      channels: of the map.
      hidden: see `SqueezeExcite`.
    """

    channels: int
    hidden: int

    @nn.compact
    def __call__(self) -> tuple[Array, ...]:
        fc1, fc2 = Conv(self.hidden, name="fc1"), Conv(self.channels, name="fc2")
        return *fc1.weights(self.channels), *fc2.weights(self.hidden)


class SqueezeExcite(nn.Module):
    """Multiplies every channel by a gate that is computed from the mean of the map (Hu et al. 2018).

    Attributes:
      hidden: channels between the two 1x1 convolutions.
      activation: between them.
      inits: 'kernel_init' and 'bias_init' of both; PyTorch's defaults for what is not given.
    """

    hidden: int
    activation: str = "relu"
    inits: Mapping[str, Initializer] = FrozenDict()

    @nn.compact
    def gate(self, mean: Array) -> Array:
        """Returns the factors of a map with this mean; both `[B, 1, 1, C]`."""
        gate = ACTIVATIONS[self.activation](Conv(self.hidden, name="fc1", **self.inits)(mean))
        return nn.sigmoid(Conv(mean.shape[-1], name="fc2", **self.inits)(gate))

    def __call__(self, x: Array) -> Array:
        return x * self.gate(spatial_mean(x))


class Stage(nn.Module):
    """Blocks one after another.

    Attributes:
      blocks: constructors of the blocks.
    """

    blocks: Sequence[Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for i, block in enumerate(self.blocks):
            x = block(name=f"blocks_{i}")(x, train=train)
        return x


class ConvNeXtBlock(Block):
    """Depthwise 7x7 convolution, LayerNorm, MLP and layer scale on a residual branch (Liu et al. 2022).

    Attributes:
      drop_path: rate of dropping the branch.
      init_values: initial layer scale.
    """

    drop_path: float = 0.0
    init_values: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        channels = x.shape[-1]
        padding = 3
        conv = Conv(channels, 7, padding=padding, groups=channels, name="conv_dw", **TRUNC_NORMAL)
        x, kernel, bias = nn.dtypes.promote_dtype(x, *conv.weights(channels))
        y, x = convolve_beside(x, kernel, padding)
        norm, mlp = LayerNorm(1e-6, name="norm"), Mlp(4 * channels, channels, inits=TRUNC_NORMAL, name="mlp")
        gamma = parameter(self, "gamma", nn.initializers.constant(self.init_values), (channels,))
        return residual_mlp(y, norm, mlp, self.drop_path, train=train, gamma=gamma, residual=x, shift=bias)


class StripeAttention(nn.Module):
    """Attention inside of windows, plus a depthwise convolution of the values: CSWin's position encoding, LePE.

    Attributes:
      heads: of the attention.
      window: height and width.
    """

    heads: int
    window: tuple[int, int]

    @nn.compact
    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        """Maps queries, keys and values, all `[B, H, W, C]`, to `[B, H, W, C]`.

        Maps that the windows do not divide are padded. The attention leaves the padding out, and the convolution reads
        it as the zeros around a window.
        """
        size = v.shape[1:3]
        padded = next_multiple(size, self.window)
        q, k, v = (pad_map(part, padded) for part in (q, k, v))
        sizes = dict(zip(("h", "w"), self.window, strict=True))
        rows, columns = (side // step for side, step in zip(padded, self.window, strict=True))
        keys = None
        if padded != size:
            keys = rearrange(real_pixels(size, padded), "1 (i h) (j w) 1 -> (i j) (h w)", **sizes)
        # Every window is padded by itself: the convolution never reads pixels of a neighbouring stripe.
        local = rearrange(v, "b (i h) (j w) c -> (b i j) h w c", **sizes)
        position = Conv(v.shape[-1], 3, padding=1, groups=v.shape[-1], name="get_v")(local)
        q, k, v = (
            rearrange(part, "b (i h) (j w) (n d) -> (b i j) n (h w) d", n=self.heads, **sizes) for part in (q, k, v)
        )
        out = attention(q * q.shape[-1] ** -0.5, k, v, keys=keys)
        out = rearrange(out, "b n (h w) d -> b h w (n d)", **sizes)
        out = rearrange(out + position, "(b i j) h w c -> b (i h) (j w) c", i=rows, j=columns)
        return out[:, : size[0], : size[1]]


class CSWinBlock(Block):
    """Attention in vertical and horizontal stripes side by side, then an MLP (Dong et al. 2022).

    The first half of the channels attends in stripes of full height, the second half in stripes of full width. Without
    stripes, all channels attend over the whole map in one branch.

    Attributes:
      heads: of both halves together.
      stripe: height of the horizontal and width of the vertical stripes in pixels; None for no stripes.
      mlp_groups: 1 for linear maps, more for grouped convolutions.
      drop_path: rate of dropping each residual branch.
    """

    heads: int
    stripe: tuple[int, int] | None
    mlp_groups: int = 1
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        height, width, channels = x.shape[1:]
        qkv = jnp.split(Linear(3 * channels, name="qkv", **TRUNC_NORMAL)(LayerNorm(1e-5, name="norm1")(x)), 3, axis=-1)
        if self.stripe is None:
            y = StripeAttention(self.heads, (height, width), name="attns_0")(*qkv)
        else:
            windows = ((height, self.stripe[1]), (self.stripe[0], width))
            halves = zip(*(jnp.split(part, 2, axis=-1) for part in qkv), strict=True)
            branches = [
                StripeAttention(self.heads // 2, window, name=f"attns_{i}")(*half)
                for i, (window, half) in enumerate(zip(windows, halves, strict=True))
            ]
            y = jnp.concatenate(branches, axis=-1)
        x = x + DropPath(self.drop_path)(Linear(channels, name="proj", **TRUNC_NORMAL)(y), train=train)
        norm = LayerNorm(1e-5, name="norm2")
        if self.mlp_groups == 1:
            mlp = Mlp(4 * channels, channels, inits=TRUNC_NORMAL, name="mlp")
            return residual_mlp(x, norm, mlp, self.drop_path, train=train)
        y = GroupedMlp(self.mlp_groups, name="mlp")(norm(x), train=train)
        return x + DropPath(self.drop_path)(y, train=train)


def tapped_blocks(depths: Sequence[int], taps: int) -> list[int]:
    """Numbers of the blocks of a backbone's third stage whose outputs are feature maps too; the first block is 1.

    Args:
      depths: blocks of the stages.
      taps: number of such blocks, at equal distances inside of the stage.

    Raises:
      ValueError: the stage has too few blocks.
    """
    depth = depths[2] if len(depths) > 2 else 0
    if taps and taps >= depth:
        raise ValueError(
            f"{taps} taps do not fit inside of a third stage of {depth} blocks; the most is {max(depth - 1, 0)}"
        )
    step = depth // (taps + 1)
    return [step * (i + 1) for i in range(taps)]
