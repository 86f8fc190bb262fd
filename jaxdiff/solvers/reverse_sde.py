"""The reverse SDE in steps, and Langevin's corrections between them (Song et al. 2021)."""

from collections.abc import Callable

import jax
import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.sde import coefficients
from jaxdiff.solvers.grids import Grid, Point
from jaxdiff.solvers.steps import transition
from jaxdiff.solvers.table import Image, SolverTable, Tape

Increments = Callable[[Grid], tuple[np.ndarray, np.ndarray]]


def euler_maruyama(grid: Grid) -> SolverTable:
    """Euler and Maruyama's method on the reverse SDE, in the process's own time.

    A step has the drift and the diffusion of its start, and needs g^2 dt well below sigma^2: many steps, and more where
    noise is added fast, as at the start of the cosine schedule and of the flow. `reverse_diffusion` takes any
    steps. The last step to clean data takes the predicted x_0.
    Raises JaxdiffError for a grid from data to noise, and one that starts without signal.
    """
    grid.must_start_finite("noise")
    return _reverse(grid, _euler_maruyama, 0, 0.0)


def reverse_diffusion(grid: Grid) -> SolverTable:
    """Undo each step of the forward process as that process took it (Song et al. 2021, appendix E, equation 46).

    What Euler and Maruyama's method becomes with the transition between nodes in the place of drift and diffusion. The
    last step to clean data takes the predicted x_0. Raises JaxdiffError for a grid from data to noise.
    """
    return _reverse(grid, _transition, 0, 0.0)


def predictor_corrector(grid: Grid, corrections: int = 1, snr: float = 0.16) -> SolverTable:
    """Each step of `reverse_diffusion`, then Langevin's at the new noise level (Song et al. 2021, algorithms 2 to 5).

    corrections: Langevin steps, an evaluation each. snr: each has the size 2 (snr sigma)^2. The paper measures the
    lengths of noise and score in every batch, which gives the same where the score is as long as that of the noise; so
    an example does not depend on its batch, and steps are a table.
    Raises JaxdiffError for corrections below 0, an snr that is not positive, and a grid from data to noise.
    """
    if corrections < 0 or snr <= 0:
        raise JaxdiffError(f"corrections must not be negative, and snr must be above 0: not {corrections} and {snr}.")
    return _reverse(grid, _transition, corrections, snr)


def _euler_maruyama(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The increments f dt and g^2 dt [N] of the forward process over each step, from their values at its start."""
    with jax.enable_x64(True):
        drift, diffusion = (np.asarray(c) for c in coefficients(grid.process, grid.t[:-1]))
    dt = grid.t[:-1] - grid.t[1:]
    return drift * dt, diffusion**2 * dt


def _transition(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The same increments of the process itself: alpha_{t|s} - 1 and sigma^2_{t|s}."""
    alpha_ts, variance_ts = transition(grid)
    return alpha_ts - 1, variance_ts


def _reverse(grid: Grid, increments: Increments, corrections: int, snr: float) -> SolverTable:
    grid.must_descend("The reverse SDE")
    drift, variance = increments(grid)
    tape = Tape()
    x = tape.start
    for i in range(grid.num_steps):
        s, t = grid[i], grid[i + 1]
        D = tape.denoise(x, s)
        if t.sigma == 0:
            return tape.table(D)
        x = x - drift[i] * x + variance[i] * _score(x, D, s) + np.sqrt(variance[i]) * tape.noise()
        for _ in range(corrections):
            D = tape.denoise(x, t)
            step = 2 * (snr * t.sigma) ** 2
            x = x + step * _score(x, D, t) + np.sqrt(2 * step) * tape.noise()
    return tape.table(x)


def _score(x: Image, D: Image, s: Point) -> Image:
    """Of x at a point, by its prediction."""
    return (s.alpha * D - x) / s.sigma**2
