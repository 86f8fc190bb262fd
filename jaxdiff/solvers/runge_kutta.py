"""Euler, Heun, the midpoint method and RK4 along straight paths, with EDM's stochastic churn (Karras et al. 2022)."""

import math
from collections.abc import Callable

from jaxdiff.errors import JaxdiffError
from jaxdiff.solvers.grids import Grid, Point
from jaxdiff.solvers.steps import slope, straight
from jaxdiff.solvers.table import Image, SolverTable, Tape, scale_noise

Step = Callable[[Tape, Image, Point, Point, Grid], Image]


def euler(grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf) -> SolverTable:
    """Euler's method, which is `ddim`; with churn as `heun` has it."""
    return _stepped(grid, _euler, s_churn, s_tmin, s_tmax)


def heun(grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf) -> SolverTable:
    """Heun's method, two rows a step but for the last to clean data (Karras et al. 2022, algorithms 1 and 2).

    Before a step whose noise level sigma / alpha is in [s_tmin, s_tmax], the level is raised by the share
    min(s_churn / N, sqrt(2) - 1). Where that holds for the first step, the table starts at the raised level: pure
    noise has any. A process that ends at a level is not taken beyond it.
    Raises JaxdiffError for negative values, and for churn on a grid from data to noise.
    """
    return _stepped(grid, _heun, s_churn, s_tmin, s_tmax)


def edm(
    grid: Grid, s_churn: float = 40.0, s_tmin: float = 0.05, s_tmax: float = 50.0, s_noise: float = 1.003
) -> SolverTable:
    """EDM's stochastic sampler: `heun` with the churn that was best on ImageNet-64 (Karras et al. 2022, table 5)."""
    return scale_noise(heun(grid, s_churn, s_tmin, s_tmax), s_noise)


def dpm2(grid: Grid, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf) -> SolverTable:
    """The midpoint method at the geometric mean of two levels (k-diffusion's DPM-2); with churn as `heun` has it."""
    return _stepped(grid, _dpm2, s_churn, s_tmin, s_tmax)


def rk4(grid: Grid) -> SolverTable:
    """The classical method of order 4, four rows a step but for the last to clean data, which is Euler's."""

    def step(tape, x, s, t, grid):
        if t.level == 0:
            return _euler(tape, x, s, t, grid)
        return rk4_step(tape, x, s, grid.at_level((s.level + t.level) / 2), t)[0]

    return _stepped(grid, step)


def rk4_step(tape: Tape, x: Image, s: Point, mid: Point, t: Point) -> tuple[Image, Image]:
    """Give x at t, and the slope at s: two stages at `mid`, which the classical method has halfway from s to t."""
    h = t.level - s.level
    k = first = tape.keep(slope(x, tape.denoise(x, s), s))
    y = x / s.scale
    total = y + h / 6 * k
    for stage, weight, reach in ((mid, 2, mid.level - s.level), (mid, 2, mid.level - s.level), (t, 1, h)):
        x_stage = stage.scale * (y + reach * k)
        total = tape.keep(total)
        k = slope(x_stage, tape.denoise(x_stage, stage), stage)
        total = total + weight * h / 6 * k
    return t.scale * total, first


def _stepped(
    grid: Grid, step: Step, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf
) -> SolverTable:
    if min(s_churn, s_tmin, s_tmax) < 0:
        raise JaxdiffError("s_churn, s_tmin and s_tmax must not be negative.")
    if s_churn:
        grid.must_descend("s_churn")
    if s_churn or step is not _euler:
        grid.must_start_finite("level")
    share = min(s_churn / grid.num_steps, math.sqrt(2) - 1)
    tape = Tape()
    x = tape.start
    for i in range(grid.num_steps):
        s, t = grid[i], grid[i + 1]
        if share and s_tmin <= s.noise <= s_tmax:
            raised = grid.at(s.lam - math.log1p(share))
            if i:
                x = _noisier(x, s, raised, tape.noise())
            s = raised
        x = step(tape, x, s, t, grid)
    return tape.table(x)


def _noisier(x: Image, s: Point, t: Point, z: Image) -> Image:
    """Bring x at s to t, which has more noise, by q(x_t | x_s)."""
    kept = t.alpha / s.alpha
    return kept * x + math.sqrt(max(t.sigma**2 - (kept * s.sigma) ** 2, 0.0)) * z


def _euler(tape: Tape, x: Image, s: Point, t: Point, grid: Grid) -> Image:
    return straight(x, tape.denoise(x, s), s, t)


def _heun(tape: Tape, x: Image, s: Point, t: Point, grid: Grid) -> Image:
    D = tape.denoise(x, s)
    ahead = straight(x, D, s, t)
    if t.level == 0:
        return ahead
    half_step = (t.level - s.level) / 2
    halfway = tape.keep(x / s.scale + half_step * slope(x, D, s))
    return t.scale * (halfway + half_step * slope(ahead, tape.denoise(ahead, t), t))


def _dpm2(tape: Tape, x: Image, s: Point, t: Point, grid: Grid) -> Image:
    D = tape.denoise(x, s)
    if t.level == 0:
        return straight(x, D, s, t)
    mid = grid.at_level(math.sqrt(s.level * t.level))
    x_mid = straight(x, D, s, mid)
    return t.scale * (x / s.scale + (t.level - s.level) * slope(x_mid, tape.denoise(x_mid, mid), mid))
