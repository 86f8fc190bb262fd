"""How likely a model finds an image, two ways: DDPM's variational bound, and the density along the probability flow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.ode import exact_trace, hutchinson_trace, solve_ode
from jaxdiff.preconditioning import Denoiser
from jaxdiff.schedules import Node, Process, expand, node_at, snr
from jaxdiff.solvers import Grid

LEVELS = 256
"""Values of a number of an 8-bit image: they lie 2 / 255 apart in [-1, 1]."""


def bits_per_dim(log_likelihood: jax.Array, num_dims: int) -> jax.Array:
    """Nats of an example to bits for each of its numbers: -log_likelihood / (num_dims log 2), of any shape."""
    return -log_likelihood / (num_dims * np.log(2))


# --- the variational bound -------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """The parts of an upper bound on -log p(x_0), in nats (Ho et al. 2020, equation 5).

    prior: L_T [B]. steps: L_{t-1} for every step from noise to data, [N - 1, B], or [K, B] where K of them stand for
    all. reconstruction: L_0 [B].
    """

    prior: jax.Array
    steps: jax.Array
    reconstruction: jax.Array

    @property
    def total(self) -> jax.Array:
        """The bound [B]."""
        return self.prior + self.steps.sum(0) + self.reconstruction


def variational_bound(
    denoise: Denoiser,
    grid: Grid,
    x_0: jax.Array,
    keys: jax.Array,
    *,
    variance: str = "small",
    levels: int | None = LEVELS,
    num_terms: int | None = None,
) -> Bound:
    """Bound the code length of x_0 [B, ...] in [-1, 1] by ancestral sampling's transitions over a grid, as a `Bound`.

    keys: one per example, [B]; each term is estimated from one noising of x_0, without bias. For a discrete process and
    all of its T steps this is DDPM's bound; for others it is that of Kingma et al. 2021, appendix A.
    variance: of the transitions, as of the solver `ddpm`: "small" or "large".
    levels: values that a number of x_0 can have, in equal steps over [-1, 1]; L_0 is the probability of its interval
    under N(x0_hat, sigma^2 / alpha^2) at the grid's last noise, with open ends (equation 13). None: x_0 is continuous,
    L_0 is that normal's density, and the bound one on the negative log density of x_0.
    num_terms: estimate the sum over steps from as many of them, one drawn from each of num_terms equal parts for each
    example: unbiased too. None evaluates all, grid.num_steps evaluations.

    Pure; put it under jit with the grid closed over. Raises JaxdiffError for a grid that does not end on clean data,
    another variance, and num_terms that are not 1 to num_steps - 1.
    """
    if grid.sigma[-1] != 0 or grid.num_steps < 2:
        raise JaxdiffError("The bound is over a grid of two or more steps that ends on clean data: with final='zero'.")
    if variance not in ("small", "large"):
        raise JaxdiffError(f"The variance of the bound's transitions is 'small' or 'large', not {variance!r}.")
    num_steps = grid.num_steps - 1  # without the last, which is L_0
    if num_terms is not None and not 1 <= num_terms <= num_steps:
        raise JaxdiffError(f"num_terms must be 1 to {num_steps}, one less than the grid's steps, not {num_terms}.")
    size = np.prod(x_0.shape[1:])
    squared = lambda x: _sum(x**2)  # noqa: E731

    def predicted(row: jax.Array) -> jax.Array:
        """x0_hat from x_0 with the noise of a node [B]."""
        node = Node(*(jnp.asarray(field, x_0.dtype)[row] for field in (grid.t, grid.alpha, grid.sigma)))
        draw = lambda key, row: jax.random.normal(jax.random.fold_in(key, row), x_0.shape[1:], x_0.dtype)  # noqa: E731
        noise = jax.vmap(draw)(keys, row)
        return denoise(expand(node.alpha, x_0.ndim) * x_0 + expand(node.sigma, x_0.ndim) * noise, node)

    weights, offsets = (jnp.asarray(c, x_0.dtype) for c in _transitions(grid, variance))

    def term(row: jax.Array) -> jax.Array:
        return weights[row] * squared(x_0 - predicted(row)) + size * offsets[row]

    if num_terms is None:
        rows = jnp.broadcast_to(jnp.arange(num_steps)[:, None], (num_steps, len(x_0)))
    else:
        u = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, grid.num_steps), (num_terms,)))(keys)
        strata = (jnp.arange(num_terms)[:, None] + u.T) / num_terms
        rows = jnp.minimum(jnp.floor(strata * num_steps).astype(int), num_steps - 1)
    steps = jax.lax.map(term, rows) * (num_steps / len(rows))

    ratio = grid.sigma[0] ** 2 / (grid.alpha[0] ** 2 + grid.sigma[0] ** 2)  # of variances, x_T given x_0 and drawn
    prior = 0.5 * (size * (ratio - 1 - np.log(ratio)) + (1 - ratio) * squared(x_0))
    last = jnp.full(len(x_0), num_steps)
    std = grid.sigma[-2] / grid.alpha[-2]
    log_p = (
        _log_normal(x_0, predicted(last), std) if levels is None else log_interval(x_0, predicted(last), std, levels)
    )
    return Bound(prior, steps, -_sum(log_p))


def _transitions(grid: Grid, variance: str) -> tuple[np.ndarray, np.ndarray]:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) = weight |x_0 - x0_hat|^2 + offset a number, [N - 1] each, in float64.

    With the posterior's own variance weight is half of what the signal to noise gains (Kingma et al. 2021, equation
    13 f.), and offset 0.
    """
    alpha, sigma = grid.alpha[:-1], grid.sigma[:-1]
    ratio = snr(alpha, sigma)
    weight = 0.5 * (ratio[1:] - ratio[:-1])
    if variance == "small":
        return weight, np.zeros_like(weight)
    share = (sigma[1:] / sigma[:-1]) ** 2  # of the small variance in the large
    return weight * share, 0.5 * (share - 1 - np.log(share))


def _sum(x: jax.Array) -> jax.Array:
    """Over the numbers of each example, [B, ...] to [B]."""
    return jnp.sum(x, tuple(range(1, x.ndim)))


def _log_normal(x: jax.Array, mean: jax.Array, std: float) -> jax.Array:
    return -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))


def log_interval(x: jax.Array, mean: jax.Array, std: float, levels: int) -> jax.Array:
    """The log probability of the interval around each of `levels` values in [-1, 1], the outer ones without end."""
    half = 1 / (levels - 1)
    low = jnp.where(x < -1 + half, -jnp.inf, (x - half - mean) / std)
    high = jnp.where(x > 1 - half, jnp.inf, (x + half - mean) / std)
    # mirrored to where the normal's lower tail keeps its digits
    mirrored = low + high > 0
    low, high = jnp.where(mirrored, -high, low), jnp.where(mirrored, -low, high)
    log_low, log_high = jax.scipy.special.log_ndtr(low), jax.scipy.special.log_ndtr(high)
    return log_high + jnp.log1p(-jnp.exp(log_low - log_high))


# --- the density along the probability flow --------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What `encode` found: the latent [B, ...] at t_max, the log density of x_t [B] in nats, and what it cost.

    converged: whether t_max was reached; latent and density are NaN if not.
    """

    latent: jax.Array
    log_density: jax.Array
    num_evaluations: jax.Array
    converged: jax.Array


def encode(
    denoise: Denoiser,
    process: Process,
    x: jax.Array,
    keys: jax.Array | None = None,
    t: float | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int | None = None,
) -> Encoded:
    """Carry x_t [B, ...] at time t to noise along the probability flow, and its density with it.

    log p(x_t) is the density of the noise that x_t becomes, a normal of variance alpha^2 + sigma^2 at t_max, and the
    change of volume on the way (Song et al. 2021, section 4.3 and appendix D.2).
    t: None is t_min, the least noise that the process has. keys: one per example [B], for Hutchinson's estimate of the
    trace, which is unbiased in nats; None takes the exact one, at an evaluation for every number of x. num_steps: as
    many equal steps instead of the tolerances; see `solve_ode`, whose errors are raised here.
    """
    trace = exact_trace if keys is None else hutchinson_trace(keys)
    t = process.t_min if t is None else t
    tolerances = {"rtol": rtol, "atol": atol, "num_steps": num_steps}
    solution = solve_ode(denoise, process, x, t, process.t_max, trace=trace, **tolerances)
    std = float(np.hypot(*process.alpha_sigma(np.asarray(float(process.t_max)))))
    log_noise = _sum(_log_normal(solution.x, 0.0, std))
    return Encoded(solution.x, log_noise + solution.log_volume, solution.num_evaluations, solution.converged)


def flow_log_likelihood(
    denoise: Denoiser,
    process: Process,
    x_0: jax.Array,
    keys: jax.Array,
    *,
    dequantisation: str = "uniform",
    exact: bool = False,
    levels: int = LEVELS,
    **options,
) -> Encoded:
    """Estimate a lower bound on log P(x_0) of x_0 [B, ...], one of `levels` values in [-1, 1]: an `Encoded`, in nats.

    Its log_density is that of the values, with the noise taken off that makes them continuous (Theis et al. 2016):
    "uniform": over the interval of each value. alpha_t times the sum is taken for an x_t at t_min (Song et al. 2021).
    "gaussian": the process's own at t_min, and log p(x_0 | x_t) - log q(x_t | x_0) added with the p(x_0 | x_t) of
    `variational_bound`'s L_0. The rest of that bound is what the flow makes tight.
    The first pays for each number that is certain, such as a black background's, where the noise at t_min is wider
    than the interval.

    keys: one per example, [B]. exact: take the exact trace, else Hutchinson's. options: rtol, atol, num_steps of
    `encode`. Raises JaxdiffError for another dequantisation.
    """
    node = node_at(process, float(process.t_min))
    alpha, sigma = float(node.alpha), float(node.sigma)
    draw = lambda sampler: jax.vmap(lambda key: sampler(key, x_0.shape[1:], x_0.dtype))(  # noqa: E731
        jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    )
    if dequantisation == "uniform":
        width = 2 / (levels - 1)
        x = alpha * (x_0 + width * (draw(jax.random.uniform) - 0.5))
        correction = np.prod(x_0.shape[1:]) * np.log(alpha * width)
    elif dequantisation == "gaussian":
        noise = draw(jax.random.normal)
        x = alpha * x_0 + sigma * noise
        at = Node(*(jnp.asarray(c, x_0.dtype) for c in node))
        decoded = log_interval(x_0, denoise(x, at), sigma / alpha, levels)
        correction = _sum(decoded - _log_normal(sigma * noise, 0.0, sigma))
    else:
        raise JaxdiffError(f"Dequantisation is 'uniform' or 'gaussian', not {dequantisation!r}.")
    encoded = encode(denoise, process, x, None if exact else keys, **options)
    return encoded._replace(log_density=encoded.log_density + correction)
