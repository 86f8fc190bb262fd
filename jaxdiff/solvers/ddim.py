"""DDIM (Song et al. 2021a, equation 12) between any nodes of any process; its kin Euler and ancestral Euler."""

import numpy as np

from jaxdiff.solvers.grids import Grid
from jaxdiff.solvers.steps import check_eta, transition
from jaxdiff.solvers.table import SolverTable, Tape


def ddim(grid: Grid, eta: float = 0.0) -> SolverTable:
    """Step along the predicted x_0 and the noise that it implies.

    eta in [0, 1] scales the fresh noise (equation 16). 0 is deterministic, and is Euler's method in the frame of EDM
    as well as in that of a flow; 1 is `ddpm` with the small variance, and k-diffusion's ancestral Euler.
    Raises JaxdiffError outside [0, 1], and for an eta on a grid from data to noise.
    """
    check_eta(eta, grid)
    fresh = np.zeros(grid.num_steps)
    if eta:
        fresh = eta * np.sqrt(transition(grid)[1]) * grid.sigma[1:] / grid.sigma[:-1]
    tape = Tape()
    x = tape.start
    for i in range(grid.num_steps):
        s, t = grid[i], grid[i + 1]
        D = tape.denoise(x, s)
        of_eps = np.sqrt(t.sigma**2 - fresh[i] ** 2) / s.sigma  # eps = (x - alpha_s D) / sigma_s
        x = of_eps * x + (t.alpha - of_eps * s.alpha) * D + fresh[i] * tape.noise()
    return tape.table(x)
