"""Latent space: an autoencoder from its config, and the scaling that gives its latents mean 0 and variance 1."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxdiff.config import AutoencoderConfig
from jaxdiff.config import AutoencoderKL as AutoencoderSection
from jaxdiff.errors import JaxdiffError
from jaxdiff.models import AutoencoderKL, DiagonalGaussian


class Autoencoder(NamedTuple):
    """An autoencoder without its parameters, as a run of its own trains it."""

    config: AutoencoderConfig
    model: AutoencoderKL
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def make_autoencoder(
    config: AutoencoderConfig, image_shape: Sequence[int], class_names: Sequence[str] = ()
) -> Autoencoder:
    """Build what a config describes, for images [H, W, C].

    Raises JaxdiffError where the network does not fit the images, before anything is compiled.
    """
    autoencoder = Autoencoder(config, build(config.model, image_shape[-1]), tuple(image_shape), tuple(class_names))
    jax.eval_shape(lambda: init_autoencoder(autoencoder.model, autoencoder.image_shape, jax.random.key(0)))
    return autoencoder


def build(section: AutoencoderSection, channels: int) -> AutoencoderKL:
    """The network that a section describes, for images of so many channels."""
    return AutoencoderKL(out_channels=channels, **(vars(section) | {"dtype": jnp.dtype(section.dtype)}))


def init_autoencoder(model: AutoencoderKL, image_shape: tuple[int, int, int], key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of an autoencoder of images [H, W, C]."""
    return {"autoencoder": model.init(key, jnp.zeros((1, *image_shape)))["params"]}


def latent_shape(model: AutoencoderKL, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(h, w, D) of the latents of images [H, W, C]."""
    height, width, _ = image_shape
    return height // model.downsampling, width // model.downsampling, model.latent_channels


def posterior(model: AutoencoderKL, params: dict[str, Any], images: Float[Array, "B H W C"]) -> DiagonalGaussian:
    """What latents [B, h, w, D] images in [-1, 1] may have, as the encoder gives it: not scaled."""
    return model.apply({"params": params["autoencoder"]}, images, method="encode")


def draw_latents(
    params: dict[str, Any], gaussian: DiagonalGaussian, keys: Key[Array, " B"] | None = None
) -> Float[Array, "B h w D"]:
    """Latents of unit variance from what the encoder gave: drawn with a key each, or the most likely ones.

    (latents - shift_factor) * scaling_factor, with diffusers' names; Rombach et al. (2022, appendix G) take one
    scaling_factor for all channels and no shift, which for Stable Diffusion 1 is 0.18215.
    """
    latents = gaussian.mode if keys is None else jax.vmap(DiagonalGaussian.sample)(gaussian, keys)
    return (latents - params["latents"]["shift_factor"]) * params["latents"]["scaling_factor"]


def decode(model: AutoencoderKL, params: dict[str, Any], z: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
    """The images of latents of unit variance, not clipped to [-1, 1]."""
    latents = z / params["latents"]["scaling_factor"] + params["latents"]["shift_factor"]
    return model.apply({"params": params["autoencoder"]}, latents, method="decode")


def unit_scaling(channels: int) -> dict[str, Float[Array, " D"]]:
    """The factors that leave latents as they are."""
    return {"shift_factor": jnp.zeros(channels), "scaling_factor": jnp.ones(channels)}


def measure_scaling(
    gaussian_of: Callable[[np.ndarray], DiagonalGaussian], size: int, most: int = 4096, block: int = 256
) -> dict[str, Float[Array, " D"]]:
    """Each channel's shift_factor and scaling_factor, from latents drawn for at most so many of `size` images.

    gaussian_of: indices [block] to what their latents may have. The images are spread evenly over all. A channel's
    variance is that of its means and the mean of its variances together, in float64.
    Raises JaxdiffError where a channel does not vary: an autoencoder that was not trained, or not well.
    """
    count = min(most, size)
    index = np.arange(count) * size // count
    index = np.resize(index, -(-count // block) * block)  # blocks of one size, for one compilation
    first, second = 0.0, 0.0
    for start in range(0, len(index), block):
        mean, logvar = (np.asarray(x, np.float64) for x in gaussian_of(index[start : start + block]))
        first = first + mean.mean((0, 1, 2))
        second = second + (mean**2 + np.exp(logvar)).mean((0, 1, 2))
    blocks = len(index) // block
    mean = first / blocks
    variance = second / blocks - mean**2
    if not np.isfinite(variance).all() or (variance <= 1e-10).any():
        raise JaxdiffError(
            f"The autoencoder's latents have variances of {np.round(variance, 12).tolist()}: a channel that does not "
            "vary, or is not finite, can not be diffused; train it longer, with a smaller reconstruction.kl_weight."
        )
    return {"shift_factor": jnp.float32(mean), "scaling_factor": jnp.float32(variance**-0.5)}
