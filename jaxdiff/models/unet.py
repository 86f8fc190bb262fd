"""The U-Net of DDPM and of Stable Diffusion, laid out as diffusers' UNet2DModel and UNet2DConditionModel.

A parameter's path here is its path there with ".<number>" written "_<number>" and "." written "/":
`down_blocks.0.resnets.1.conv1.weight` is `down_blocks_0/resnets_1/conv1/kernel`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.attention import SpatialSelfAttention, SpatialTransformer, resolve_heads
from jaxdiff.models.layers import (
    Condition,
    GroupNorm,
    TimestepEmbedding,
    check_sides,
    conv3x3,
    depth_to_space,
    recomputed,
    sinusoidal_embedding,
    space_to_depth,
    upsample_nearest,
)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, the time between them, around a shortcut (Ho et al. 2020, appendix B)."""

    channels: int
    scale_shift: bool = False
    dropout: float = 0.0
    num_groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], time: Float[Array, "B D"] | None = None, deterministic: bool = True
    ) -> Float[Array, "B H W channels"]:
        """Transform; `time` is already activated, and None where the network knows no time."""
        norm = lambda name: GroupNorm(self.num_groups, self.eps, self.dtype, name=name)  # noqa: E731
        h = conv3x3(self.channels, name="conv1", dtype=self.dtype)(nn.silu(norm("norm1")(x)))
        if time is None:
            h = norm("norm2")(h)
        else:
            width = 2 * self.channels if self.scale_shift else self.channels
            time = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(time)[:, None, None, :]
            if self.scale_shift:
                scale, shift = jnp.split(time, 2, axis=-1)
                h = norm("norm2")(h) * (1 + scale) + shift
            else:
                h = norm("norm2")(h + time)
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=deterministic)
        h = conv3x3(self.channels, name="conv2", dtype=self.dtype, zero_init=True)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """Halve the size by a convolution with stride 2; padding 0 pads below and on the right only, as DDPM does."""

    padding: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H/2 W/2 C"]:
        """Halve."""
        pad = (self.padding, 1)
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=(pad, pad), dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Double the size by repeating pixels, and convolve."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
        """Double."""
        return conv3x3(x.shape[-1], name="conv", dtype=self.dtype)(upsample_nearest(x))


class DownBlock(nn.Module):
    """One level on the way down: residual blocks, attention after each where asked for, then half the size."""

    channels: int
    layers: int
    resnet: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None
    downsample: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self, x: Array, time: Array | None = None, cond: Condition | None = None, deterministic: bool = True
    ) -> tuple[Array, list[Array]]:
        """Transform, and return with the result everything that the way up will want."""
        skips = []
        for i in range(self.layers):
            x = self.resnet(self.channels, name=f"resnets_{i}")(x, time, deterministic)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{i}")(x, cond)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(name="downsamplers_0")(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The lowest level: a residual block, attention where asked for, a residual block."""

    channels: int
    resnet: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self, x: Array, time: Array | None = None, cond: Condition | None = None, deterministic: bool = True
    ) -> Array:
        """Transform."""
        x = self.resnet(self.channels, name="resnets_0")(x, time, deterministic)
        if self.attention is not None:
            x = self.attention(name="attentions_0")(x, cond)
        return self.resnet(self.channels, name="resnets_1")(x, time, deterministic)


class UpBlock(nn.Module):
    """One level on the way up: residual blocks that may each take a skip, attention where asked for, twice the size."""

    channels: int
    layers: int
    resnet: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None
    upsample: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self,
        x: Array,
        skips: list[Array] | None = None,
        time: Array | None = None,
        cond: Condition | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Transform; the skips are taken from the end of the list, and None is without."""
        for i in range(self.layers):
            if skips is not None:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = self.resnet(self.channels, name=f"resnets_{i}")(x, time, deterministic)
            if self.attention is not None:
                x = self.attention(name=f"attentions_{i}")(x, cond)
        return x if self.upsample is None else self.upsample(name="upsamplers_0")(x)


class UNet(nn.Module):
    """A U-Net over [B, H, W, C] with time, classes and a context sequence as conditions.

    out_channels: channels of the output.
    channels: width of each level; each level halves the size of the one before.
    layers_per_block: residual blocks a level on the way down; one more on the way up.
    attention_levels: the levels that attend, 0 being the largest. mid_attention: whether the lowest point does.
    num_heads: attention heads; None takes as many as make each `dim_head` wide.
    context_dim: width of the context; with it attention is Stable Diffusion's transformer block, else DDPM's.
    num_class_embeds: rows of the class embedding; None is without classes.
    scale_shift: the time scales and shifts the second norm's output (ADM), and is not added before it (DDPM).
    patch_size: p x p pixels enter as one with p^2 times the channels: wide layers at low resolution.
    dtype: of the computation, float32 or bfloat16; parameters and the statistics of norms stay float32.
    remat: works out again in the backward pass what is inside each residual and attention block, to save memory.
    num_groups, eps, flip_sin_to_cos, freq_shift, downsample_padding: as in diffusers' configurations.
    """

    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 256)
    layers_per_block: int = 2
    attention_levels: tuple[int, ...] = (1,)
    mid_attention: bool = True
    num_heads: int | None = None
    dim_head: int = 64
    transformer_depth: int = 1
    context_dim: int | None = None
    num_class_embeds: int | None = None
    scale_shift: bool = False
    dropout: float = 0.0
    patch_size: int = 1
    num_groups: int = 32
    eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        t: Float[Array, " B"],
        cond: Condition | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B H W out_channels"]:
        """Evaluate at times t under a condition. `train` turns dropout on, which draws from the rng "dropout".

        Returns float32. Raises JaxdiffError where the image can not be halved as often as there are levels, where
        widths do not divide into groups or heads, and where the condition is not the one the network was built for.
        """
        cond = cond or Condition()
        self._check(x, cond)
        resnet = partial(
            recomputed(ResnetBlock, self.remat, static_argnums=(3,)),
            scale_shift=self.scale_shift,
            dropout=self.dropout,
            num_groups=self.num_groups,
            eps=self.eps,
            dtype=self.dtype,
        )
        heads = {"num_heads": self.num_heads, "dim_head": self.dim_head}
        norm = {"num_groups": self.num_groups, "dtype": self.dtype}
        if self.context_dim is None:
            attention = partial(recomputed(SpatialSelfAttention, self.remat), eps=self.eps, **heads, **norm)
        else:
            attention = partial(
                recomputed(SpatialTransformer, self.remat), depth=self.transformer_depth, **heads, **norm
            )

        time_dim = 4 * self.channels[0]
        time = sinusoidal_embedding(
            t, self.channels[0], flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )
        time = TimestepEmbedding(time_dim, self.dtype, name="time_embedding")(time)
        if self.num_class_embeds is not None:
            time = time + nn.Embed(self.num_class_embeds, time_dim, dtype=self.dtype, name="class_embedding")(
                cond.label
            )
        time = nn.silu(time)

        x = conv3x3(self.channels[0], name="conv_in", dtype=self.dtype)(space_to_depth(x, self.patch_size))

        last = len(self.channels) - 1
        skips = [x]
        for i, channels in enumerate(self.channels):
            block = DownBlock(
                channels,
                self.layers_per_block,
                resnet,
                attention if i in self.attention_levels else None,
                partial(Downsample, self.downsample_padding, self.dtype) if i < last else None,
                name=f"down_blocks_{i}",
            )
            x, new = block(x, time, cond, not train)
            skips += new

        middle = MidBlock(self.channels[-1], resnet, attention if self.mid_attention else None, name="mid_block")
        x = middle(x, time, cond, not train)

        for i, channels in reversed(list(enumerate(self.channels))):
            block = UpBlock(
                channels,
                self.layers_per_block + 1,
                resnet,
                attention if i in self.attention_levels else None,
                partial(Upsample, self.dtype) if i > 0 else None,
                name=f"up_blocks_{last - i}",
            )
            x = block(x, skips, time, cond, not train)

        x = nn.silu(GroupNorm(self.num_groups, self.eps, self.dtype, name="conv_norm_out")(x))
        x = conv3x3(self.patch_size**2 * self.out_channels, name="conv_out", dtype=self.dtype, zero_init=True)(x)
        return depth_to_space(x, self.patch_size).astype(jnp.float32)

    def _check(self, x: Array, cond: Condition) -> None:
        """Say in one sentence what can not fit, before a shape error deep inside does."""
        levels = len(self.channels)
        check_sides("A UNet", x, levels, self.patch_size)
        attending = [c for i, c in enumerate(self.channels) if i in self.attention_levels]
        attending += [self.channels[-1]] if self.mid_attention else []
        for channels in attending:
            if channels % resolve_heads(channels, self.num_heads, self.dim_head):
                raise JaxdiffError(f"{channels} channels do not divide into heads as num_heads or dim_head ask.")
        if bad := [i for i in self.attention_levels if not 0 <= i < levels]:
            raise JaxdiffError(f"attention_levels must lie in 0 ... {levels - 1}, and {bad} do not.")
        for what, built, given in (
            ("class labels", self.num_class_embeds is not None, cond.label is not None),
            ("a context", self.context_dim is not None, cond.context is not None),
        ):
            if built != given:
                raise JaxdiffError(
                    f"This UNet was built {'for' if built else 'without'} {what} and was called "
                    f"{'with' if given else 'without'}."
                )
