"""Multistep consistency sampling (Song et al. 2023, algorithm 1), as latent consistency models use it."""

from jaxdiff.solvers.grids import Grid
from jaxdiff.solvers.table import SolverTable, Tape


def lcm(grid: Grid) -> SolverTable:
    """Predict the image, and add fresh noise up to the next node: for models distilled to predict it in one go.

    Raises JaxdiffError for a grid from data to noise.
    """
    grid.must_descend("lcm")
    tape = Tape()
    x = tape.start
    for i in range(grid.num_steps):
        D, t = tape.denoise(x, grid[i]), grid[i + 1]
        x = t.alpha * D + t.sigma * tape.noise()
    return tape.table(x)
