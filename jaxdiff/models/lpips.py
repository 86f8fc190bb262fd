"""How different two images look: the LPIPS distance (Zhang et al. 2018) on the features of VGG16.

A parameter's path here is its path in torchvision's `vgg16` and in the heads of the package `lpips` with ".<number>"
written "_<number>" and "." written "/": `features.0.weight` is `features_0/kernel`, `lin0.model.1.weight` is
`lin0/model_1/kernel`.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.errors import JaxdiffError
from jaxdiff.torch_files import read_torch_file

_LEVELS = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28)))
"""VGG16 (Simonyan & Zisserman 2015): the width of each level, and the numbers of its convolutions in `features`."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation by channel, for pixels in [-1, 1] and rounded as the package has them."""


class LPIPS(nn.Module):
    """The perceptual distance of images [B, H, W, C] in [-1, 1] from as many others: [B], float32.

    VGG16's features of both images are brought to unit length at each pixel, at the end of each of its five levels;
    the distance is the weighted squared difference, averaged over pixels and added up over levels (Zhang et al. 2018,
    version 0.1 of their weights). Latent diffusion's autoencoders are trained with it (Rombach et al. 2022).

        params = load_lpips("vgg16-397923af.pth", "vgg.pth")
        distances = LPIPS().apply(params, images, others)

    Fresh parameters are He et al.'s (2015) for the convolutions and ones for the heads: a distance, if not a trained
    one. The gradient is finite everywhere, also between equal images and where no feature responds.

    dtype: of the convolutions, float32 or bfloat16; parameters, and what follows the features, stay float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, " B"]:
        """Compare.

        Raises JaxdiffError where the two differ in shape, have neither 1 channel (a grey, which is repeated) nor 3, or
        are less than 16 pixels high or wide.
        """
        _check_images(x, y)
        he = nn.initializers.he_normal()
        levels = [
            [nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, kernel_init=he, name=f"features_{i}") for i in convs]
            for width, convs in _LEVELS
        ]

        def features(image):
            image = jnp.broadcast_to(image, (*image.shape[:3], 3))
            image = (image - jnp.array(_SHIFT)) / jnp.array(_SCALE)
            for i, level in enumerate(levels):
                if i > 0:
                    image = nn.max_pool(image, (2, 2), (2, 2))
                for conv in level:
                    image = nn.relu(conv(image))
                yield _unit_length(image.astype(jnp.float32))

        distance = jnp.zeros(len(x))
        # One after the other and not as one batch: where only y is differentiated, x then costs no backward pass.
        for i, (of_x, of_y) in enumerate(zip(features(x), features(y), strict=True)):
            difference = jnp.mean((of_x - of_y) ** 2, (1, 2))  # a head is linear, so the mean may come first
            distance += LinearHead(name=f"lin{i}")(difference)
        return distance


class LinearHead(nn.Module):
    """The weights of a level's channels."""

    @nn.compact
    def __call__(self, difference: Float[Array, "B D"]) -> Float[Array, " B"]:
        """Weigh and add up."""
        return nn.Dense(1, use_bias=False, kernel_init=nn.initializers.ones, name="model_1")(difference)[:, 0]


def _unit_length(x: Float[Array, "B h w D"], eps: float = 1e-10) -> Float[Array, "B h w D"]:
    """Divide the features of each pixel by their length.

    The root's slope is infinite where all features are zero; there it is not taken, so that the gradient is finite.
    """
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    positive = squared > 0
    length = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
    return x / (length + eps)


def _check_images(x: Array, y: Array) -> None:
    if x.shape != y.shape:
        raise JaxdiffError(f"LPIPS compares images of one shape, and these are {x.shape} and {y.shape}.")
    if x.ndim != 4 or x.shape[-1] not in (1, 3):
        raise JaxdiffError(f"LPIPS compares images [B, H, W, C] of 1 or 3 channels, and these are {x.shape}.")
    if min(x.shape[1:3]) < 16:
        raise JaxdiffError(
            f"LPIPS needs images of at least 16x16, since VGG16 halves them four times, and these are "
            f"{x.shape[1]}x{x.shape[2]}: enlarge them, or leave the perceptual term out."
        )


def load_lpips(vgg16_path: str | Path, heads_path: str | Path) -> dict:
    """The parameters of `LPIPS` from the two files that they are published in; PyTorch is not needed.

    vgg16_path: torchvision's VGG16 trained on ImageNet, https://download.pytorch.org/models/vgg16-397923af.pth
        (528 MB, of which the convolutions are used, 59 MB).
    heads_path: the heads of version 0.1, `lpips/weights/v0.1/vgg.pth` in the package lpips (`pip download --no-deps
        lpips`, and unzip the wheel) and in its repository, https://github.com/richzhang/PerceptualSimilarity.

    Raises JaxdiffError, naming the file, where one is missing or does not read, and for the first weight that it lacks
    or that has another shape.
    """
    vgg16, heads = read_torch_file(vgg16_path), read_torch_file(heads_path)
    params, inputs = {}, 3
    for width, convs in _LEVELS:
        for i in convs:
            kernel = _take(vgg16, vgg16_path, f"features.{i}.weight", (width, inputs, 3, 3))
            bias = _take(vgg16, vgg16_path, f"features.{i}.bias", (width,))
            params[f"features_{i}"] = {"kernel": jnp.asarray(kernel.transpose(2, 3, 1, 0)), "bias": jnp.asarray(bias)}
            inputs = width
    for i, (width, _) in enumerate(_LEVELS):
        weight = _take(heads, heads_path, f"lin{i}.model.1.weight", (1, width, 1, 1))
        params[f"lin{i}"] = {"model_1": {"kernel": jnp.asarray(weight.reshape(width, 1))}}
    return {"params": params}


def _take(state: dict[str, np.ndarray], path: str | Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of a state dict in float32, or JaxdiffError."""
    files = "LPIPS takes torchvision's vgg16 and the package lpips' heads for it (v0.1/vgg.pth), in this order"
    if name not in state:
        raise JaxdiffError(f"{path} has no {name}: {files}.")
    if state[name].shape != shape:
        raise JaxdiffError(f"{name} in {path} is {state[name].shape} where {shape} is needed: {files}.")
    return state[name].astype(np.float32)
