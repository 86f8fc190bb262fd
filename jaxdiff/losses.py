"""What a network is trained on: times drawn per example, one squared error, and its weight."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.errors import JaxdiffError
from jaxdiff.preconditioning import Network, precondition
from jaxdiff.schedules import Process, expand, node_at, snr

TIME_DISTRIBUTIONS = ("uniform", "lognormal")
WEIGHTINGS = ("plain", "snr", "min_snr", "edm")


def stratify(u: jax.Array, index: jax.Array, batch_size: int) -> jax.Array:
    """One uniform number u [] and positions [B] to a stratified draw [B]: one number in each 1/batch_size of [0, 1).

    Each is uniform by itself, and together they cover the times evenly (Kingma et al. 2021, appendix I.1).
    """
    return (u + index / batch_size) % 1.0


def time_from_uniform(
    process: Process, u: jax.Array, distribution: str = "uniform", *, mean: float = -1.2, std: float = 1.2
) -> jax.Array:
    """Map u [B], uniform in [0, 1), to training times [B] of a process: the distribution's quantile function.

    "uniform": over the integers 0 ... T - 1, or over [t_min, t_max].
    "lognormal": log(sigma / alpha) ~ N(mean, std^2), held to the process's ends (Karras et al. 2022, table 1; on the
    flow process this is the logit-normal of Esser et al. 2024).
    """
    if distribution == "uniform":
        if process.timesteps is not None:
            # u may round up to 1 in float32, and T is one past the last row
            return jnp.minimum(jnp.floor(u * process.timesteps), process.timesteps - 1)
        return process.t_min + u * (process.t_max - process.t_min)
    if distribution == "lognormal":
        # away from 0 and 1, where the quantile is infinite
        log_ratio = mean + std * jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6))
        t = jnp.clip(process.time_at(-2 * log_ratio), process.t_min, process.t_max)
        return t if process.timesteps is None else jnp.round(t)
    raise JaxdiffError(f"There is no time distribution {distribution!r}; there are {', '.join(TIME_DISTRIBUTIONS)}.")


def loss_weight(
    weighting: str,
    alpha: jax.Array,
    sigma: jax.Array,
    c_out: jax.Array,
    *,
    min_snr_gamma: float = 5.0,
    sigma_data: float = 0.5,
) -> jax.Array:
    """The factor on the squared error in the network's own space, of alpha's shape.

    Each weighting but "plain" is a weight on the error of x_0, the same for every prediction, times c_out^2:
    "snr": alpha^2 / sigma^2 (the error of eps). "min_snr": that, at most `min_snr_gamma` (Hang et al. 2023,
    equation 8). "edm": 1 / sigma^2 + 1 / sigma_data^2 at the noise level sigma / alpha (Karras et al. 2022, table 1).
    """
    if weighting == "plain":
        return jnp.ones_like(c_out)
    if weighting == "snr":
        return snr(alpha, sigma) * c_out**2
    if weighting == "min_snr":
        return jnp.minimum(snr(alpha, sigma), min_snr_gamma) * c_out**2
    if weighting == "edm":
        return (snr(alpha, sigma) + sigma_data**-2) * c_out**2
    raise JaxdiffError(f"There is no weighting {weighting!r}; there are {', '.join(WEIGHTINGS)}.")


def diffusion_loss(
    network: Network,
    process: Process,
    x_0: jax.Array,
    t: jax.Array,
    noise: jax.Array,
    cond: Any = None,
    *,
    prediction: str = "eps",
    weighting: str = "plain",
    min_snr_gamma: float = 5.0,
    sigma_data: float = 0.5,
) -> jax.Array:
    """The weighted squared error of each example, [B]: one noising of x_0, one evaluation of the network.

    x_0, noise: [B, ...]; t: [B]. With prediction "eps" and weighting "plain" this is DDPM's L_simple (Ho et al. 2020,
    equation 14).
    """
    node = node_at(process, t)
    p = precondition(prediction, node.alpha, node.sigma, sigma_data)
    wide = lambda coefficient: expand(coefficient, x_0.ndim)  # noqa: E731
    x_t = wide(node.alpha) * x_0 + wide(node.sigma) * noise
    target = wide(p.a) * x_0 + wide(p.b) * noise
    output = network(wide(p.c_in) * x_t, process.c_noise(t), cond)
    error = jnp.mean((output.astype(jnp.float32) - target) ** 2, axis=range(1, x_0.ndim))
    weight = loss_weight(weighting, node.alpha, node.sigma, p.c_out, min_snr_gamma=min_snr_gamma, sigma_data=sigma_data)
    return weight * error
