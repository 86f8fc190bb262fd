"""Table 2, what the network predicts: a row (a, b) per prediction, F ~ a x_0 + b eps, and all else follows from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import Node, Process, expand

Network = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""F(x, c_noise, cond): [B, ...] and [B] to [B, ...]; cond is a pytree of arrays [B, ...], or None."""

Denoiser = Callable[[jax.Array, Node], jax.Array]
"""x_t [B, ...] and its node (scalars or [B]) to the predicted x_0 [B, ...]: all that solvers and guidance know."""


class Preconditioning(NamedTuple):
    """The coefficients around a network at some node, each of the node's shape.

    x0_hat = c_skip x_t + c_out F(c_in x_t, ...), and F is trained towards a x_0 + b eps.
    """

    c_in: jax.Array
    c_skip: jax.Array
    c_out: jax.Array
    a: jax.Array
    b: jax.Array


def _edm(alpha, sigma, sigma_data):
    scale = jnp.sqrt(sigma**2 + (alpha * sigma_data) ** 2)
    return sigma / (sigma_data * scale), -alpha * sigma_data / scale


_TARGETS: dict[str, Callable] = {
    "eps": lambda alpha, sigma, sigma_data: (jnp.zeros_like(sigma), jnp.ones_like(sigma)),
    "x0": lambda alpha, sigma, sigma_data: (jnp.ones_like(sigma), jnp.zeros_like(sigma)),
    "v": lambda alpha, sigma, sigma_data: (-sigma, alpha),  # Salimans & Ho 2022, appendix D
    "flow": lambda alpha, sigma, sigma_data: (-jnp.ones_like(sigma), jnp.ones_like(sigma)),  # d x_t / d t
    "score": lambda alpha, sigma, sigma_data: (jnp.zeros_like(sigma), -1 / sigma),  # Song & Ermon 2019
    "edm": _edm,  # Karras et al. 2022, table 1, at the noise level sigma / alpha
}

PREDICTIONS = tuple(_TARGETS)


def precondition(prediction: str, alpha: jax.Array, sigma: jax.Array, sigma_data: float = 0.5) -> Preconditioning:
    """The table's row for a prediction in "eps", "x0", "v", "flow", "score", "edm".

    From x_t = alpha x_0 + sigma eps and F = a x_0 + b eps follows x_0 = (b x_t - sigma F) / (alpha b - sigma a).
    `sigma_data` is the data's standard deviation, of use to "edm" alone. Raises JaxdiffError for an unknown name.
    """
    if prediction not in _TARGETS:
        raise JaxdiffError(f"There is no prediction {prediction!r}; there are {', '.join(PREDICTIONS)}.")
    a, b = _TARGETS[prediction](alpha, sigma, sigma_data)
    determinant = alpha * b - sigma * a
    data_std = sigma_data if prediction == "edm" else 1.0
    # c_in is 1 wherever the process keeps the variance, and brings an exploding one back to the network's scale.
    c_in = 1 / jnp.sqrt((alpha * data_std) ** 2 + sigma**2)
    if prediction != "edm":
        c_in = jnp.minimum(c_in, 1.0)
    return Preconditioning(c_in, c_skip=b / determinant, c_out=-sigma / determinant, a=a, b=b)


def make_denoiser(
    network: Network, process: Process, prediction: str, sigma_data: float = 0.5
) -> Callable[[jax.Array, Node, Any], jax.Array]:
    """Wrap a network as denoise(x_t, node, cond) -> x0_hat, all [B, ...]; node's fields are scalars or [B]."""

    def denoise(x: jax.Array, node: Node, cond: Any = None) -> jax.Array:
        p = precondition(prediction, node.alpha, node.sigma, sigma_data)
        c_in, c_skip, c_out = (expand(c, x.ndim) for c in (p.c_in, p.c_skip, p.c_out))
        c_noise = jnp.broadcast_to(process.c_noise(node.t), x.shape[:1])
        return c_skip * x + c_out * network(c_in * x, c_noise, cond)

    return denoise
