"""The forward process as an SDE, dx = f(t) x dt + g(t) dw: its coefficients, its reverse, and the score."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdiff.preconditioning import Denoiser
from jaxdiff.schedules import Node, Process, expand, node_at


class Coefficients(NamedTuple):
    """Of dx = drift x dt + diffusion dw, each of t's shape: f(t) and g(t) of Song et al. 2021, equation 5."""

    drift: jax.Array
    diffusion: jax.Array


def coefficients(process: Process, t: jax.Array | float) -> Coefficients:
    """The SDE of which a process's alpha and sigma are the marginals, at times t of any shape.

    f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2, which is what the SDE does to mean and variance. The
    processes "vp", "subvp" and "ve" give the three SDEs of Song et al. 2021; at a row of a discrete process f is half
    of log(1 - beta_t), the slope of what led to it.
    """
    t = jnp.asarray(t, jnp.result_type(float))
    (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(process.alpha_sigma, (t,), (jnp.ones_like(t),))
    drift = d_alpha / alpha
    return Coefficients(drift, jnp.sqrt(2 * sigma * (d_sigma - drift * sigma)))


def score(denoise: Denoiser, x: jax.Array, node: Node) -> jax.Array:
    """The gradient of log p(x_t) [B, ...] by any denoiser: (alpha x0_hat - x_t) / sigma^2.

    Tweedie's formula (Efron 2011). x: x_t [B, ...]; node: scalars or [B].
    """
    alpha, sigma = (expand(jnp.asarray(c, x.dtype), x.ndim) for c in (node.alpha, node.sigma))
    return (alpha * denoise(x, node) - x) / sigma**2


def reverse_sde(
    denoise: Denoiser, process: Process, noise_scale: float = 1.0
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The SDE that leads from noise to data as time falls: (x [B, ...], t) -> its drift [B, ...] and diffusion.

    dx = (f x - (1 + noise_scale^2) / 2 g^2 score) dt + noise_scale g dw. Its marginals are the process's for every
    noise_scale (Karras et al. 2022, equation 6): 1 is the reverse SDE of Anderson 1982 (Song et al. 2021, equation
    6), 0 the probability flow ODE (equation 13). t: a scalar or [B]. What a solver of SDEs of one's own takes.
    """

    def drift_and_diffusion(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        drift, diffusion = coefficients(process, t)
        wide = lambda c: expand(c.astype(x.dtype), x.ndim)  # noqa: E731
        of_score = (1 + noise_scale**2) / 2 * diffusion**2
        return wide(drift) * x - wide(of_score) * score(denoise, x, node_at(process, t)), noise_scale * diffusion

    return drift_and_diffusion
