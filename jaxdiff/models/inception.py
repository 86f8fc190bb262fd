"""Inception-v3 as the Frechet "FID" has it: the network of 2015, up to its last pool (Szegedy et al. 2016).

A parameter's path here is its path in torchvision's `Inception3` with "." written "/": a convolution such as
`Mixed_5b.branch1x1` has "kernel", and "scale", "bias", "mean" and "var" of the batch norm after it.
"""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff.errors import JaxdiffError
from jaxdiff.torch_files import read_torch_file

NUM_FEATURES = 2048
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"

# What follows is the network as data. A chain is a list of steps: a convolution, a pool, or a tuple of chains whose
# results are put side by side.


class _Conv(NamedTuple):
    name: str
    width: int
    kernel: tuple[int, int]
    stride: int
    pad: bool


def _conv(name: str, width: int, kernel: int | tuple[int, int], stride: int = 1, *, pad: bool | None = None) -> _Conv:
    """A convolution: padded to keep the size, unless it strides."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    return _Conv(name, width, kernel, stride, stride == 1 if pad is None else pad)


def _average(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), padding="SAME")


def _halve(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), (2, 2))


def _pooled(pool: Any, width: int) -> list:
    return [pool, _conv("branch_pool", width, 1)]


def _a(pooled: int) -> tuple:
    double = [_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3)]
    five = [_conv("branch5x5_1", 48, 1), _conv("branch5x5_2", 64, 5)]
    return [_conv("branch1x1", 64, 1)], five, double, _pooled(_average, pooled)


def _b() -> tuple:
    double = [_conv("branch3x3dbl_1", 64, 1), _conv("branch3x3dbl_2", 96, 3), _conv("branch3x3dbl_3", 96, 3, 2)]
    return [_conv("branch3x3", 384, 3, 2)], double, [_halve]


def _c(width: int) -> tuple:
    wide, tall = (1, 7), (7, 1)
    seven = [_conv("branch7x7_1", width, 1), _conv("branch7x7_2", width, wide), _conv("branch7x7_3", 192, tall)]
    double = [_conv("branch7x7dbl_1", width, 1)]
    double += [_conv(f"branch7x7dbl_{i}", width, tall if i % 2 == 0 else wide) for i in (2, 3, 4)]
    double += [_conv("branch7x7dbl_5", 192, wide)]
    return [_conv("branch1x1", 192, 1)], seven, double, _pooled(_average, 192)


def _d() -> tuple:
    seven = [_conv("branch7x7x3_1", 192, 1), _conv("branch7x7x3_2", 192, (1, 7)), _conv("branch7x7x3_3", 192, (7, 1))]
    three = [_conv("branch3x3_1", 192, 1), _conv("branch3x3_2", 320, 3, 2)]
    return three, [*seven, _conv("branch7x7x3_4", 192, 3, 2)], [_halve]


def _e(pool: Any) -> tuple:
    both = lambda name: ([_conv(f"{name}a", 384, (1, 3))], [_conv(f"{name}b", 384, (3, 1))])  # noqa: E731
    double = [_conv("branch3x3dbl_1", 448, 1), _conv("branch3x3dbl_2", 384, 3), both("branch3x3dbl_3")]
    three = [_conv("branch3x3_1", 384, 1), both("branch3x3_2")]
    return [_conv("branch1x1", 320, 1)], three, double, _pooled(pool, 192)


_STEM = [
    _conv("Conv2d_1a_3x3", 32, 3, 2),
    _conv("Conv2d_2a_3x3", 32, 3, pad=False),
    _conv("Conv2d_2b_3x3", 64, 3),
    _halve,
    _conv("Conv2d_3b_1x1", 80, 1),
    _conv("Conv2d_4a_3x3", 192, 3, pad=False),
    _halve,
]
_MIXED = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e(_average),
    "Mixed_7c": _e(_maximum),  # where torchvision averages: the FID's network does not
}


class Inception(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] to the features of the last pool, [B, 2048]; `inception_input` brings them there.

    The weights of the Frechet distance are from 2015, not torchvision's: `load_inception` reads them. Fresh parameters
    are He et al.'s (2015), with norms that do nothing. Batch norms use their stored statistics, so an image's features
    depend on it alone.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B 2048"]:
        """Take features. Raises JaxdiffError for images below 75x75, of which the pools leave nothing."""
        if x.ndim != 4 or min(x.shape[1:3]) < 75 or x.shape[-1] != 3:
            raise JaxdiffError(f"Inception takes images [B, H, W, 3] of at least 75x75, and these are {x.shape}.")
        x = _run(_STEM, x)
        for name in _MIXED:
            x = Mixed(name=name)(x)
        return x.mean((1, 2))


class Mixed(nn.Module):
    """Chains of convolutions side by side: those of its name."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        """Put what the chains give one after the other."""
        return _run([_MIXED[self.name]], x)


class BasicConv(nn.Module):
    """A convolution, a batch norm with stored statistics, and a rectifier."""

    width: int
    kernel: tuple[int, int]
    stride: int
    pad: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w D"]:
        """Convolve, normalise, rectify."""
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel, x.shape[-1], self.width))
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale, var = (self.param(name, ones, (self.width,)) for name in ("scale", "var"))
        bias, mean = (self.param(name, zeros, (self.width,)) for name in ("bias", "mean"))
        padding = [(k // 2, k // 2) for k in self.kernel] if self.pad else "VALID"
        strides = (self.stride, self.stride)
        x = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        factor = scale / jnp.sqrt(var + 1e-3)
        return nn.relu(x * factor + (bias - mean * factor))


def _run(chain: list, x: Array) -> Array:
    """Follow a chain, within the module that is being called."""
    for step in chain:
        if isinstance(step, _Conv):
            x = BasicConv(**step._asdict())(x)
        elif isinstance(step, tuple):
            x = jnp.concatenate([_run(part, x) for part in step], axis=-1)
        else:
            x = step(x)
    return x


def inception_input(images: Float[Array, "B H W C"]) -> Float[Array, "B 299 299 3"]:
    """Images of 1 or 3 channels as the FID's network takes them: bilinear, without smoothing first, as pytorch-fid.

    Raises JaxdiffError for another number of channels.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise JaxdiffError(f"Inception takes images [B, H, W, C] of 1 or 3 channels, and these are {images.shape}.")
    colour = jnp.broadcast_to(images, (*images.shape[:3], 3))
    return jax.image.resize(colour, (len(images), 299, 299, 3), "linear", antialias=False)


def load_inception(path: str | Path) -> dict[str, Any]:
    """The parameters of `Inception` from pt_inception-2015-12-05-6726825d.pth, which pytorch-fid publishes (91 MB).

    Raises JaxdiffError where the file is missing, with its address, does not read, or lacks a weight.
    """
    if not Path(path).is_file():
        raise JaxdiffError(f"There are no weights of Inception at {path}: fetch {URL} to there.")
    state = read_torch_file(path)
    image = jnp.zeros((1, 75, 75, 3))
    like = jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]
    names = {"kernel": "conv.weight", "scale": "bn.weight", "bias": "bn.bias", "mean": "bn.running_mean"}
    names["var"] = "bn.running_var"

    def take(place: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        *modules, parameter = (key.key for key in place)
        name = ".".join([*modules, names[parameter]])
        if name not in state:
            raise JaxdiffError(f"{path} has no {name}: it is not the file of {URL}.")
        weight = state[name].astype(np.float32)
        weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight
        if weight.shape != leaf.shape:
            raise JaxdiffError(f"{name} in {path} is {weight.shape} where {leaf.shape} is needed: fetch {URL}.")
        return weight

    return {"params": jax.tree_util.tree_map_with_path(take, like)}
