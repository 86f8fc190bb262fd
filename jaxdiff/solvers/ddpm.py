"""DDPM's ancestral sampling (Ho et al. 2020, algorithm 2) between any nodes of any process."""

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.grids import Grid
from jaxdiff.solvers.steps import transition
from jaxdiff.solvers.table import SolverTable, Tape


def ddpm(grid: Grid, variance: str = "small") -> SolverTable:
    """Draw x_s from q(x_s | x_t, x_0 = D) (equations 6 and 7).

    variance: "small" is the posterior's own, beta_tilde; "large" is beta (section 3.2: right for data that is a point
    and data that is white noise, respectively). The last row, to clean data, adds none.
    Raises JaxdiffError for another variance, and for a grid from data to noise.
    """
    if variance not in ("small", "large"):
        raise JaxdiffError(f"The variance of ddpm is 'small' or 'large', not {variance!r}.")
    grid.must_descend("ddpm")
    alpha_ts, variance_ts = transition(grid)
    variance_t, variance_s = grid.sigma[:-1] ** 2, grid.sigma[1:] ** 2
    of_x = alpha_ts * variance_s / variance_t
    of_x0 = grid.alpha[1:] * variance_ts / variance_t
    small = variance_ts * variance_s / variance_t
    of_noise = np.sqrt(small if variance == "small" else np.where(variance_s > 0, variance_ts, 0.0))
    tape = Tape()
    x = tape.start
    for i in range(grid.num_steps):
        D = tape.denoise(x, grid[i])
        x = of_x[i] * x + of_x0[i] * D + of_noise[i] * tape.noise()
    return tape.table(x)
