"""The small parts that all networks share: what they are conditioned on, time embeddings, norms, resampling."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.errors import JaxdiffError


class Condition(NamedTuple):
    """What a network is conditioned on beside time; None where it is not.

    label: class indices. context: a sequence for cross-attention. context_mask: True where it may be looked at.
    """

    label: Int[Array, " B"] | None = None
    context: Float[Array, "B L C"] | None = None
    context_mask: Bool[Array, "B L"] | None = None


def sinusoidal_embedding(
    t: Float[Array, " B"], dim: int, *, flip_sin_to_cos: bool = False, freq_shift: float = 1.0
) -> Float[Array, "B dim"]:
    """Sines, then cosines, of t at dim // 2 frequencies from 1 down to about 1/10000 (Vaswani et al. 2017; DDPM).

    The exponents are -log(10000) / (dim // 2 - freq_shift) * i. DDPM and the course shift by 1; Stable Diffusion by 0,
    with the cosines first (`flip_sin_to_cos`). An odd dim ends in a zero.
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10000.0) / max(half - freq_shift, 1) * jnp.arange(half))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    halves = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(halves[::-1] if flip_sin_to_cos else halves, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nn.Module):
    """Two dense layers on top of the sinusoidal embedding: [B, any] to [B, dim]."""

    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, embedding: Float[Array, "B D"]) -> Float[Array, "B dim"]:
        """Embed."""
        hidden = nn.silu(nn.Dense(self.dim, dtype=self.dtype, name="linear_1")(embedding))
        return nn.Dense(self.dim, dtype=self.dtype, name="linear_2")(hidden)


class GroupNorm(nn.Module):
    """Group normalisation over space and the channels of a group (Wu & He 2018), statistics in float32.

    Sums over space come first and over the group's channels after: several times faster than linen's on CPU, where
    the reduction over a split channel axis does not vectorise.
    """

    num_groups: int = 32
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        """Normalise; JaxdiffError where the number of channels does not divide by the number of groups."""
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise JaxdiffError(f"channels must divide by num_groups {self.num_groups}, and {channels} does not.")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        space = tuple(range(1, x.ndim - 1))

        def group_mean(y):
            by_group = rearrange(jnp.mean(y, space), "b (g c) -> b g c", g=self.num_groups)
            return jnp.repeat(jnp.mean(by_group, -1), channels // self.num_groups, axis=-1)

        wide = x.astype(jnp.float32)
        mean = group_mean(wide)
        variance = jnp.maximum(group_mean(wide**2) - mean**2, 0.0)
        gain = scale * jax.lax.rsqrt(variance + self.eps)
        shift = bias - mean * gain
        return (wide * jnp.expand_dims(gain, space) + jnp.expand_dims(shift, space)).astype(self.dtype)


def conv3x3(channels: int, *, name: str, dtype: Any, stride: int = 1, zero_init: bool = False) -> nn.Conv:
    """A 3x3 convolution padded by one pixel on each side, as PyTorch's `padding=1`."""
    kernel_init = nn.initializers.zeros if zero_init else nn.initializers.lecun_normal()
    return nn.Conv(
        channels, (3, 3), strides=stride, padding=((1, 1), (1, 1)), dtype=dtype, kernel_init=kernel_init, name=name
    )


def upsample_nearest(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Repeat each pixel 2x2: a broadcast, whose backward is a plain sum and 30 times cheaper than image.resize's."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def space_to_depth(x: Float[Array, "B H W C"], patch_size: int) -> Float[Array, "B H/p W/p p*p*C"]:
    """Gather p x p pixels into one with p^2 times the channels."""
    return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch_size, q=patch_size)


def depth_to_space(x: Float[Array, "B H W p*p*C"], patch_size: int) -> Float[Array, "B p*H p*W C"]:
    """Undo `space_to_depth`."""
    return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch_size, q=patch_size)


def recomputed(block: type[nn.Module], remat: bool, static_argnums: tuple[int, ...] = ()) -> type[nn.Module]:
    """A block of which the backward pass keeps the inputs alone, and works out the rest again; itself if not `remat`.

    static_argnums: the arguments that are Python values, the module itself being number 0.
    """
    return nn.remat(block, static_argnums=static_argnums) if remat else block


def check_sides(what: str, x: Float[Array, "B H W C"], levels: int, patch_size: int) -> None:
    """JaxdiffError, in one sentence, where an image can not be halved as often as `what` wants to."""
    (height, width), factor = x.shape[1:3], patch_size * 2 ** (levels - 1)
    if height % factor or width % factor:
        raise JaxdiffError(
            f"{what} of {levels} levels with patch_size {patch_size} needs image sides that divide by {factor}, "
            f"and these are {height}x{width}: give it fewer channels entries, or other images."
        )
