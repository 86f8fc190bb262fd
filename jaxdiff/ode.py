"""The probability flow ODE, solved to a tolerance: what solvers of fixed steps are measured against, and an encoder."""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.preconditioning import Denoiser
from jaxdiff.schedules import Node, Process

Trace = Callable[[Callable[[jax.Array], jax.Array], jax.Array], tuple[jax.Array, jax.Array]]
"""(f, x [B, ...]) -> f(x), and the trace of each example's Jacobian [B] or an estimate of it."""


def exact_trace(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A `Trace` from a derivative along every number of x: as many evaluations as x has numbers."""
    D, along = jax.linearize(f, x)
    size = np.prod(x.shape[1:], dtype=int)

    def diagonal(i: jax.Array) -> jax.Array:
        unit = jnp.zeros((len(x), size), x.dtype).at[:, i].set(1).reshape(x.shape)
        return along(unit).reshape(len(x), size)[:, i]

    return D, jax.lax.map(diagonal, jnp.arange(size)).sum(0)


def hutchinson_trace(keys: jax.Array) -> Trace:
    """An unbiased `Trace` from one derivative along random signs (Hutchinson 1989): about two evaluations.

    keys: one per example, [B]. The signs are the same at every call, so that an ODE stays one.
    """

    def trace(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        signs = jax.vmap(lambda key: jax.random.rademacher(key, x.shape[1:], x.dtype))(keys)
        D, along = jax.jvp(f, (x,), (signs,))
        return D, jnp.sum(signs * along, tuple(range(1, x.ndim)))

    return trace


class OdeSolution(NamedTuple):
    """What `solve_ode` found: x [B, ...] at t_end, what it cost, and whether t_end was reached (x is NaN if not).

    log_volume: [B], log |det dx(t_end) / dx(t_start)| where a divergence was asked for, else None.
    """

    x: jax.Array
    num_evaluations: jax.Array
    converged: jax.Array
    log_volume: jax.Array | None = None


def solve_ode(
    denoise: Denoiser,
    process: Process,
    x: jax.Array,
    t_start: float | jax.Array,
    t_end: float | jax.Array,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
    num_steps: int | None = None,
    trace: Trace | None = None,
) -> OdeSolution:
    """Carry x [B, ...] from t_start to t_end along the probability flow ODE (Song et al. 2021, equation 13).

    Times are the process's own, one for the whole batch. From t_max, where x is what `initial_noise` gives, to t_min it
    draws; from t_min, where x is alpha x_0 + sigma eps, to t_max it encodes. At t_min x still has noise sigma(t_min):
    `denoise(x, node_at(process, t_min))` takes it off. Clean data (sigma = 0) are infinitely far, as in log SNR.

    Each step of Tsitouras' 5(4) holds its error in w = x / sqrt(alpha^2 + sigma^2) to atol + rtol |w|, in root mean
    square over each example, so that none hides in its batch; on smooth denoisers the sum of them is 1 to 5 times that.
    Computed in x's precision, at least float32, where rounding ends the gain at 1e-6. A denoiser that computes in
    bfloat16 is too rough for less than 1e-3. Every step, accepted or not, costs 6 evaluations of the network. num_steps
    takes as many equal steps instead, whatever the error.

    trace: of the denoiser's Jacobian, `exact_trace` or a `hutchinson_trace`; with it the change of volume is integrated
    along, to the same tolerance for each number of x, and so the density (Chen et al. 2018; see `jaxdiff.likelihood`).

    Pure, and differentiable in reverse mode. Put it under jit: outside, each call compiles anew. Raises JaxdiffError
    for times where the process has no noise or no row and, outside jit, if t_end is not reached for want of steps or
    because the denoiser gives NaN; under jit, and at times that are traced, x is NaN then and `converged` False.
    """
    # In the angle phi = atan(sigma / alpha) (Salimans & Ho 2022, appendix D) w is cos(phi) x_0 + sin(phi) eps, and the
    # ODE is dw / dphi = (cos(phi) w - D) / sin(phi) whatever the process. Over u = log tan(phi / 2), where du is
    # dphi / sin(phi), nothing is divided by: dw / du = cos(phi) w - D. u = -asinh(alpha / sigma) goes as log sigma near
    # the data, and is 0 at pure noise. On the tests' mixture it takes four fifths of the evaluations of phi, and three
    # fifths of those of log SNR.
    x = jnp.asarray(x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    (u_start, scale_start), (u_end, scale_end) = (_end(process, t, dtype) for t in (t_start, t_end))

    def derivative(fraction: jax.Array, state: tuple[jax.Array, jax.Array | None], _):
        w, _ = state
        u = u_start + fraction * (u_end - u_start)
        cos, sin = -jnp.tanh(u), 1 / jnp.cosh(u)
        # Pure noise has a log SNR of -inf, which tables of times do not know: hence the smallest number.
        t = process.time_at(2 * jnp.log(jnp.maximum(jnp.sinh(-u), jnp.finfo(dtype).tiny)))
        scale = jnp.hypot(*process.alpha_sigma(t))
        # alpha and sigma by way of t alone would be rounded twice: 1 - t of a flow has three digits left at t = 0.9999.
        node = Node(*(field.astype(dtype) for field in (t, scale * cos, scale * sin)))
        at_node = lambda x: denoise(x, node)  # noqa: E731
        x = (scale * w).astype(dtype)
        D, stretch = (at_node(x), None) if trace is None else trace(at_node, x)
        if trace is not None:  # a number's share of the divergence
            stretch = ((u_end - u_start) * (cos - scale * stretch / np.prod(x.shape[1:]))).astype(dtype)
        return ((u_end - u_start) * (cos * w - D)).astype(dtype), stretch

    controller = (
        diffrax.PIDController(
            rtol,
            atol,
            norm=_worst_example,
            dtmin=16 * float(jnp.finfo(dtype).eps),  # ends the search for a step on which a NaN is none
            force_dtmin=False,
        )
        if num_steps is None
        else diffrax.StepTo(jnp.linspace(0, 1, num_steps + 1, dtype=dtype))
    )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(derivative),
        diffrax.Tsit5(),
        jnp.zeros((), dtype),
        jnp.ones((), dtype),
        jnp.asarray(0.05, dtype) if num_steps is None else None,  # the first step
        (x.astype(dtype) / scale_start, None if trace is None else jnp.zeros(len(x), dtype)),
        stepsize_controller=controller,
        max_steps=max_steps if num_steps is None else num_steps,
        throw=False,
    )
    taken = solution.stats["num_steps"]
    converged = solution.result == diffrax.RESULTS.successful
    if not isinstance(converged, jax.core.Tracer) and not converged:
        reason = (
            f"more than max_steps={max_steps}: allow more, or a larger rtol"
            if taken == max_steps
            else "steps of no length: the denoiser gives NaN, or jumps"
        )
        raise JaxdiffError(f"The ODE from t = {t_start} to {t_end} needs {reason}.")
    w, log_volume = (None if y is None else jnp.where(converged, y[0], jnp.nan) for y in solution.ys)
    if trace is not None:
        log_volume = np.prod(x.shape[1:]) * (log_volume + jnp.log(scale_end) - jnp.log(scale_start))
    # the last of a step's 7 stages is the first of the next
    return OdeSolution(scale_end * w, 1 + 6 * taken, converged, log_volume)


def _worst_example(error) -> jax.Array:
    """The root mean square of each example's errors, and of all the largest."""
    rms = lambda e: jnp.sqrt(jnp.mean(e**2, tuple(range(1, e.ndim)))).max(initial=0)  # noqa: E731
    return jnp.max(jnp.array([rms(e) for e in jax.tree.leaves(error)]))


def _end(process: Process, t: float | jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The pair of u and sqrt(alpha^2 + sigma^2) at a time: from float64 on the host, unless it is traced."""
    traced = isinstance(t, jax.core.Tracer)
    t = t.astype(dtype) if traced else np.asarray(t, np.float64)
    if t.ndim:
        raise JaxdiffError(f"The ODE begins and ends at one time for the whole batch, not at times of shape {t.shape}.")
    xp = t.__array_namespace__()
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha, sigma = process.alpha_sigma(t)
        u = -xp.arcsinh(alpha / sigma)
    exists = (-np.inf < u) & (u <= 0) & (t >= 0) & (t <= (process.timesteps or np.inf) - 1)
    if not traced and not exists:
        raise JaxdiffError(
            f"The ODE has no end at t = {t}: choose times from {process.t_min} to {process.t_max}, where sigma > 0."
        )
    return jnp.where(exists, u, jnp.nan).astype(dtype), jnp.asarray(xp.hypot(alpha, sigma), dtype)
