"""The autoencoder of latent diffusion (Rombach et al. 2022), laid out as diffusers' AutoencoderKL.

A parameter's path here is its path there with ".<number>" written "_<number>" and "." written "/":
`encoder.mid_block.attentions.0.to_q.weight` is `encoder/mid_block/attentions_0/to_q/kernel`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.attention import SpatialSelfAttention
from jaxdiff.models.layers import GroupNorm, check_sides, conv3x3, depth_to_space, recomputed, space_to_depth
from jaxdiff.models.unet import DownBlock, Downsample, MidBlock, ResnetBlock, UpBlock, Upsample


class DiagonalGaussian(NamedTuple):
    """What an image may be in latent space: independent Gaussians, a pytree of mean and log of the variance."""

    mean: Float[Array, "B *space D"]
    logvar: Float[Array, "B *space D"]

    @classmethod
    def from_moments(cls, moments: Float[Array, "B *space 2*D"]) -> "DiagonalGaussian":
        """Split the last axis into mean and log-variance, the latter clipped to [-30, 20] as in diffusers."""
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return cls(mean, jnp.clip(logvar, -30.0, 20.0))

    @property
    def mode(self) -> Float[Array, "B *space D"]:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, key: Key[Array, ""]) -> Float[Array, "B *space D"]:
        """Draw the latents, differentiably in mean and logvar (Kingma & Welling 2014).

        With a key for each example: `jax.vmap(DiagonalGaussian.sample)(gaussian, keys)`.
        """
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Array, " B"]:
        """Each example's Kullback-Leibler divergence from N(0, I), in nats, summed over all of its latents."""
        per_latent = self.mean**2 + jnp.expm1(self.logvar) - self.logvar
        return 0.5 * jnp.sum(per_latent, tuple(range(1, self.mean.ndim)))


class Encoder(nn.Module):
    """Levels that halve the size, the middle, and a convolution to `out_channels`."""

    out_channels: int
    channels: tuple[int, ...]
    layers: int
    norm: Callable[..., nn.Module]
    resnet: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out_channels"]:
        """Encode."""
        x = conv3x3(self.channels[0], name="conv_in", dtype=self.dtype)(x)
        for i, channels in enumerate(self.channels):
            downsample = partial(Downsample, 0, self.dtype) if i < len(self.channels) - 1 else None
            block = DownBlock(channels, self.layers, self.resnet, None, downsample, name=f"down_blocks_{i}")
            x, _ = block(x)
        x = MidBlock(self.channels[-1], self.resnet, self.attention, name="mid_block")(x)
        x = nn.silu(self.norm(name="conv_norm_out")(x))
        return conv3x3(self.out_channels, name="conv_out", dtype=self.dtype)(x)


class Decoder(nn.Module):
    """The middle, levels that double the size, and a convolution to `out_channels`."""

    out_channels: int
    channels: tuple[int, ...]
    layers: int
    norm: Callable[..., nn.Module]
    resnet: Callable[..., nn.Module]
    attention: Callable[..., nn.Module] | None
    dtype: Any

    @nn.compact
    def __call__(self, z: Float[Array, "B h w D"]) -> Float[Array, "B H W out_channels"]:
        """Decode."""
        x = conv3x3(self.channels[-1], name="conv_in", dtype=self.dtype)(z)
        x = MidBlock(self.channels[-1], self.resnet, self.attention, name="mid_block")(x)
        for i, channels in enumerate(reversed(self.channels)):
            upsample = partial(Upsample, self.dtype) if i < len(self.channels) - 1 else None
            block = UpBlock(channels, self.layers + 1, self.resnet, None, upsample, name=f"up_blocks_{i}")
            x = block(x)
        x = nn.silu(self.norm(name="conv_norm_out")(x))
        return conv3x3(self.out_channels, name="conv_out", dtype=self.dtype)(x)


class AutoencoderKL(nn.Module):
    """Images [B, H, W, C] in [-1, 1] to Gaussians over latents [B, h, w, latent_channels], and back.

    A variational autoencoder (Kingma & Welling 2014) with the convolutions of Rombach et al. 2022; the defaults are
    Stable Diffusion's. h = H / downsampling. The factor that brings latents to unit variance is not part of it.

        gaussian = model.apply(params, images, method="encode")
        images = model.apply(params, gaussian.sample(key), method="decode")

    latent_channels: channels of the latents.
    out_channels: channels of the images.
    channels: width of each level; each level halves the size of the one before.
    layers_per_block: residual blocks a level in the encoder; one more in the decoder.
    mid_attention: whether the lowest level attends, with a single head over all channels.
    patch_size: p x p pixels enter as one with p^2 times the channels: wide layers at low resolution.
    dtype: of the computation, float32 or bfloat16; parameters and the statistics of norms stay float32.
    remat: works out again in the backward pass what is inside each block, to save memory.
    num_groups, eps: as in diffusers' configurations.
    """

    latent_channels: int = 4
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    mid_attention: bool = True
    patch_size: int = 1
    num_groups: int = 32
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Name the four parts."""
        norm = {"num_groups": self.num_groups, "eps": self.eps, "dtype": self.dtype}
        attention = recomputed(SpatialSelfAttention, self.remat)
        parts = {
            "channels": self.channels,
            "layers": self.layers_per_block,
            "norm": partial(GroupNorm, **norm),
            "resnet": partial(recomputed(ResnetBlock, self.remat, static_argnums=(3,)), **norm),
            "attention": partial(attention, num_heads=1, **norm) if self.mid_attention else None,
            "dtype": self.dtype,
        }
        self.encoder = Encoder(2 * self.latent_channels, **parts)
        self.decoder = Decoder(self.patch_size**2 * self.out_channels, **parts)
        self.quant_conv = nn.Dense(2 * self.latent_channels, dtype=self.dtype)  # 1x1 convolutions, as dense layers
        self.post_quant_conv = nn.Dense(self.latent_channels, dtype=self.dtype)

    @property
    def downsampling(self) -> int:
        """How many pixels a side of one latent covers."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    def encode(self, x: Float[Array, "B H W C"]) -> DiagonalGaussian:
        """The distribution of the latents [B, h, w, latent_channels] of images in [-1, 1], float32.

        Raises JaxdiffError where the images can not be halved as often as there are levels, have another number of
        channels than `out_channels`, or where widths do not divide into groups.
        """
        check_sides("An AutoencoderKL", x, len(self.channels), self.patch_size)
        self._check_channels("images", x, self.out_channels)
        moments = self.quant_conv(self.encoder(space_to_depth(x, self.patch_size)))
        return DiagonalGaussian.from_moments(moments.astype(jnp.float32))

    def decode(self, z: Float[Array, "B h w D"]) -> Float[Array, "B H W out_channels"]:
        """The images of latents, float32, meant to lie in [-1, 1] and not clipped to it.

        Raises JaxdiffError where the latents do not have `latent_channels`.
        """
        self._check_channels("latents", z, self.latent_channels)
        x = self.decoder(self.post_quant_conv(z))
        return depth_to_space(x, self.patch_size).astype(jnp.float32)

    def __call__(self, x: Float[Array, "B H W C"], key: Key[Array, ""] | None = None) -> Float[Array, "B H W C"]:
        """Reconstruct images from latents drawn with `key`, or from the most likely ones where it is None."""
        gaussian = self.encode(x)
        return self.decode(gaussian.mode if key is None else gaussian.sample(key))

    def _check_channels(self, what: str, x: Array, built: int) -> None:
        """Say in one sentence what a shape error deep inside, or a silent broadcast in a loss, would not."""
        if x.shape[-1] != built:
            raise JaxdiffError(
                f"This AutoencoderKL was built for {what} of {built} channels, and these have {x.shape[-1]}."
            )
