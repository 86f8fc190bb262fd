"""The few moves that solvers are made of, on images and points of a grid."""

import functools
import math
import operator
from collections.abc import Sequence

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.grids import Grid, Point
from jaxdiff.solvers.table import Image


def check_order(order: int, highest: int, grid: Grid) -> None:
    """Raise JaxdiffError unless 1 <= order <= highest and the grid has as many steps."""
    if not 1 <= order <= highest:
        raise JaxdiffError(f"The order of this solver is 1 to {highest}, not {order}.")
    if order > grid.num_steps:
        raise JaxdiffError(f"Order {order} needs at least {order} steps, and the grid has {grid.num_steps}.")


def check_eta(eta: float, grid: Grid) -> None:
    """Raise JaxdiffError unless 0 <= eta <= 1, and eta is 0 where the grid leads from data to noise."""
    if not 0 <= eta <= 1:
        raise JaxdiffError(f"eta must lie in [0, 1], and {eta} does not.")
    if eta:
        grid.must_descend(f"eta {eta}")


def weighted_sum(weights: Sequence[float], images: Sequence[Image]) -> Image:
    """The sum of the first images, as many as there are weights."""
    return functools.reduce(operator.add, (weight * image for weight, image in zip(weights, images, strict=False)))


def noise_of(x: Image, D: Image, s: Point) -> Image:
    """The noise in x at s that a prediction implies: eps = (x - alpha D) / sigma."""
    return (x - s.alpha * D) / s.sigma


def slope(x: Image, D: Image, s: Point) -> Image:
    """The probability-flow ODE at s, dy / d level = (y - D) / level for y = x / scale: see `Point`."""
    return (x - s.scale * D) / s.sigma


def straight(x: Image, D: Image, s: Point, t: Point) -> Image:
    """From s to t with D held: DDIM's step and Euler's, in whatever frame it is written."""
    return t.sigma / s.sigma * x + (t.alpha - s.alpha * t.sigma / s.sigma) * D


def renoised(x: Image, D: Image, s: Point, t: Point, eta: float, z: Image) -> Image:
    """From s with D held down to less noise than t has, and up to t by fresh noise z: k-diffusion's ancestral step.

    eta in [0, 1] scales the fresh noise; it is DDIM's eta (Song et al. 2021a, equation 16).
    """
    down, up = ancestral_split(s, t, eta)
    return t.alpha * (down / s.noise * (x / s.alpha) + (1 - down / s.noise) * D + up * z)


def ancestral_split(s: Point, t: Point, eta: float) -> tuple[float, float]:
    """(down, up): noise levels sigma / alpha with down^2 + up^2 that of t, and up the share that is fresh."""
    up = eta * t.noise * math.sqrt(max(1 - (t.noise / s.noise) ** 2, 0.0))
    return math.sqrt(t.noise**2 - up**2), up


def transition(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """alpha_{t|s} and sigma^2_{t|s} [N] of q(x_t | x_s) between each node t and its next s (Kingma et al. 2021, 3.1).

    In DDPM's terms, from one row to the next, these are sqrt(1 - beta_t) and beta_t.
    """
    alpha = grid.alpha[:-1] / grid.alpha[1:]
    return alpha, grid.sigma[:-1] ** 2 - alpha**2 * grid.sigma[1:] ** 2
