"""Second-order steps below the next noise level, and back by fresh noise (k-diffusion's ancestral forms)."""

import math
from collections.abc import Callable

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.grids import Grid, Point
from jaxdiff.solvers.steps import ancestral_split, check_eta, renoised, straight
from jaxdiff.solvers.table import Image, SolverTable, Tape

# All step in y = x / alpha, whose noise level is sigma / alpha, under every process.


def dpm2_ancestral(grid: Grid, eta: float = 1.0) -> SolverTable:
    """`dpm2` down to the lower level, then noise. Raises JaxdiffError for an eta outside [0, 1]."""

    def to_lower(x, s, x_mid, mid, D_mid, down):
        return x / s.alpha + (down - s.noise) / mid.noise * (x_mid / mid.alpha - D_mid)

    return _ancestral(grid, eta, to_lower)


def dpmpp_2s_ancestral(grid: Grid, eta: float = 1.0) -> SolverTable:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1) down to the lower level, then noise.

    Raises JaxdiffError for an eta outside [0, 1].
    """

    def to_lower(x, s, x_mid, mid, D_mid, down):
        return down / s.noise * (x / s.alpha) + (1 - down / s.noise) * D_mid

    return _ancestral(grid, eta, to_lower)


def dpmpp_sde(grid: Grid, eta: float = 1.0, r: float = 0.5) -> SolverTable:
    """DPM-Solver++(2S) for the reverse SDE, with noise at its stage as well (k-diffusion's DPM++ SDE).

    r in (0, 1]: where between the lambdas of two nodes the stage is. Raises JaxdiffError for values outside the ranges.
    """
    if not 0 < r <= 1:
        raise JaxdiffError(f"r must lie in (0, 1], and {r} does not.")

    def step(tape, x, D, s, t):
        mid = grid.at(s.lam + r * (t.lam - s.lam))
        x_mid = renoised(x, D, s, mid, eta, tape.noise())
        D_mid = tape.denoise(x_mid, mid)
        return renoised(x, (1 - 0.5 / r) * D + 0.5 / r * D_mid, s, t, eta, tape.noise())

    return _in_two_rows(grid, eta, step)


def _ancestral(
    grid: Grid, eta: float, to_lower: Callable[[Image, Point, Image, Point, Image, float], Image]
) -> SolverTable:
    """A stage halfway in lambda to the lower level, the step to it, and noise."""

    def step(tape, x, D, s, t):
        down, up = ancestral_split(s, t, eta)
        mid = grid.at((s.lam - math.log(down)) / 2)
        x_mid = straight(x, D, s, mid)
        D_mid = tape.denoise(x_mid, mid)
        return t.alpha * (to_lower(x, s, x_mid, mid, D_mid, down) + up * tape.noise())

    return _in_two_rows(grid, eta, step)


def _in_two_rows(grid: Grid, eta: float, step: Callable[[Tape, Image, Image, Point, Point], Image]) -> SolverTable:
    """Two rows a step, `step` being given the prediction of the first; the last one, to clean data, is Euler's."""
    check_eta(eta, grid)
    grid.must_start_finite("noise")
    tape = Tape()
    x = tape.start
    for i in range(grid.num_steps):
        s, t = grid[i], grid[i + 1]
        D = tape.denoise(x, s)
        x = straight(x, D, s, t) if t.sigma == 0 else step(tape, x, D, s, t)
    return tape.table(x)
