"""Adams methods, a polynomial through the last slopes: LMS, DEIS, and with equal weights PLMS, PNDM and iPNDM."""

from collections.abc import Callable

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.grids import Grid
from jaxdiff.solvers.runge_kutta import rk4_step
from jaxdiff.solvers.steps import check_order, slope, straight, weighted_sum
from jaxdiff.solvers.table import Image, SolverTable, Tape

_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(24)

_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(grid: Grid, order: int = 4) -> SolverTable:
    """Linear multistep of order 1 to 4: the slope as a polynomial in the level (k-diffusion; Adams-Bashforth).

    Raises JaxdiffError for another order, or one of more than the steps.
    """
    check_order(order, 4, grid)
    grid.must_start_finite("level")
    return _adams(grid, order, lambda level: level, lambda u: np.ones_like(u), lower_order_final=False)


def deis(grid: Grid, order: int = 3, *, lower_order_final: bool = True) -> SolverTable:
    """DEIS of order 1 to 4: the slope as a polynomial in the log of the level (Zhang & Chen 2023, tAB-DEIS in log rho).

    lower_order_final: come down to order 1 in the last steps, as all do before clean data.
    Raises JaxdiffError for another order, or one of more than the steps.
    """
    check_order(order, 4, grid)
    grid.must_start_finite("level")
    return _adams(grid, order, np.log, np.exp, lower_order_final)


def ipndm(grid: Grid) -> SolverTable:
    """Improved PNDM: Adams-Bashforth of equal steps, of order 1 to 4 as slopes come in (Zhang & Chen 2023, 3.3)."""
    tape = Tape()
    return _adams_bashforth(grid, tape, tape.start, 0, [])


def plms(grid: Grid) -> SolverTable:
    """PNDM's multistep part alone, after one improved Euler step: N + 1 rows (Rombach et al. 2022, appendix)."""
    grid.must_start_finite("level")
    tape = Tape()
    x, s, t = tape.start, grid[0], grid[1]
    first = tape.keep(slope(x, tape.denoise(x, s), s))
    y = tape.keep(x / s.scale)
    ahead = t.scale * (y + (t.level - s.level) * first)
    if grid.num_steps == 1 and t.level == 0:
        return tape.table(ahead)
    second = slope(ahead, tape.denoise(ahead, t), t)
    x = t.scale * (y + (t.level - s.level) / 2 * (first + second))
    return _adams_bashforth(grid, tape, x, 1, [first])


def pndm(grid: Grid) -> SolverTable:
    """PNDM: three steps of RK4 with stages halfway in time, then Adams-Bashforth of order 4 (Liu et al. 2022).

    N + 9 rows. Raises JaxdiffError in fewer than 4 steps.
    """
    if grid.num_steps < 4:
        raise JaxdiffError(f"pndm needs at least 4 steps, and the grid has {grid.num_steps}: plms needs but one.")
    grid.must_start_finite("level")
    tape = Tape()
    x, slopes = tape.start, []
    for i in range(3):
        s, t = grid[i], grid[i + 1]
        x, first = rk4_step(tape, x, s, grid.at_time((s.t + t.t) / 2), t)
        slopes = [first, *slopes]
    return _adams_bashforth(grid, tape, x, 3, slopes)


def _adams_bashforth(grid: Grid, tape: Tape, x: Image, start: int, slopes: list[Image]) -> SolverTable:
    """From the node `start` on with weights of equal steps, on the slopes found before, the newest first."""
    for i in range(start, grid.num_steps):
        s, t = grid[i], grid[i + 1]
        D = tape.denoise(x, s)
        slopes = [tape.keep(slope(x, D, s)), *slopes[:3]]
        if len(slopes) == 1:
            x = straight(x, D, s, t)
        else:
            mean = weighted_sum(_ADAMS_BASHFORTH[len(slopes) - 1], slopes)
            x = t.scale * (x / s.scale + (t.level - s.level) * mean)
    return tape.table(x)


def _adams(grid: Grid, order: int, clock: Callable, measure: Callable, lower_order_final: bool) -> SolverTable:
    """Slopes as a polynomial in u = clock(level), whose step in level is measure(u) du."""
    tape = Tape()
    x, slopes, levels = tape.start, [], []
    for i in range(grid.num_steps):
        s, t = grid[i], grid[i + 1]
        D = tape.denoise(x, s)
        slopes = [tape.keep(slope(x, D, s)), *slopes[: order - 1]]
        levels = [s.level, *levels[: order - 1]]
        left = grid.num_steps - i if lower_order_final else order
        left = 1 if t.level == 0 and clock is np.log else left
        used = min(len(slopes), left)
        if used == 1:
            x = straight(x, D, s, t)
        else:
            weights = _integrals(clock(np.array(levels[:used])), clock(s.level), clock(t.level), measure)
            x = t.scale * (x / s.scale + weighted_sum(weights, slopes))
    return tape.table(x)


def _integrals(nodes: np.ndarray, start: float, end: float, measure: Callable) -> np.ndarray:
    """Integrals from start to end of the Lagrange polynomials on the nodes, by Gauss-Legendre quadrature."""
    half = (end - start) / 2
    u = start + half * (_POINTS + 1)
    values = half * _WEIGHTS * measure(u)
    weights = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        weights.append(np.sum(values * np.prod((u[:, None] - others) / (node - others), axis=1)))
    return np.array(weights)
