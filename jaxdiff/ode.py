"""The probability flow ODE, solved to a tolerance: what solvers of fixed steps are measured against, and an encoder."""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.preconditioning import Denoiser
from jaxdiff.schedules import Node, Process


class OdeSolution(NamedTuple):
    """What `solve_ode` found: x [B, ...] at t_end, what it cost, and whether t_end was reached (x is NaN if not)."""

    x: jax.Array
    num_evaluations: jax.Array
    converged: jax.Array


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
) -> OdeSolution:
    """Carry x [B, ...] from t_start to t_end along the probability flow ODE (Song et al. 2021, equation 13).

    Times are the process's own, one for the whole batch. From t_max, where x is what `initial_noise` gives, to t_min it
    draws; from t_min, where x is alpha x_0 + sigma eps, to t_max it encodes. At t_min x still has noise sigma(t_min):
    `denoise(x, node_at(process, t_min))` takes it off. Clean data (sigma = 0) are infinitely far, as in log SNR.

    Each step of Tsitouras' 5(4) holds its error in w = x / sqrt(alpha^2 + sigma^2) to atol + rtol |w|, in root mean
    square over each example, so that none hides in its batch; on smooth denoisers the sum of them is 1 to 5 times that.
    Computed in x's precision, at least float32, where rounding ends the gain at 1e-6. A denoiser that computes in
    bfloat16 is too rough for less than 1e-3. Every step, accepted or not, costs 6 evaluations of the network.

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

    def derivative(fraction: jax.Array, w: jax.Array, _) -> jax.Array:
        u = u_start + fraction * (u_end - u_start)
        cos, sin = -jnp.tanh(u), 1 / jnp.cosh(u)
        # Pure noise has a log SNR of -inf, which tables of times do not know: hence the smallest number.
        t = process.time_at(2 * jnp.log(jnp.maximum(jnp.sinh(-u), jnp.finfo(dtype).tiny)))
        scale = jnp.hypot(*process.alpha_sigma(t))
        # alpha and sigma by way of t alone would be rounded twice: 1 - t of a flow has three digits left at t = 0.9999.
        node = Node(*(field.astype(dtype) for field in (t, scale * cos, scale * sin)))
        D = denoise((scale * w).astype(dtype), node)
        return ((u_end - u_start) * (cos * w - D)).astype(dtype)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(derivative),
        diffrax.Tsit5(),
        *(jnp.asarray(fraction, dtype) for fraction in (0, 1, 0.05)),  # begin, end, first step
        x.astype(dtype) / scale_start,
        stepsize_controller=diffrax.PIDController(
            rtol,
            atol,
            norm=lambda error: jnp.sqrt(jnp.mean(error**2, tuple(range(1, error.ndim)))).max(initial=0),
            dtmin=16 * float(jnp.finfo(dtype).eps),  # ends the search for a step on which a NaN is none
            force_dtmin=False,
        ),
        max_steps=max_steps,
        throw=False,
    )
    num_steps = solution.stats["num_steps"]
    converged = solution.result == diffrax.RESULTS.successful
    if not isinstance(converged, jax.core.Tracer) and not converged:
        reason = (
            f"more than max_steps={max_steps}: allow more, or a larger rtol"
            if num_steps == max_steps
            else "steps of no length: the denoiser gives NaN, or jumps"
        )
        raise JaxdiffError(f"The ODE from t = {t_start} to {t_end} needs {reason}.")
    x = jnp.where(converged, scale_end * solution.ys[0], jnp.nan)
    return OdeSolution(x, 1 + 6 * num_steps, converged)  # the last of a step's 7 stages is the first of the next


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
