"""Table 3: solvers as pure functions from a grid of nodes to a table of small matrices, and their registry by name."""

from collections.abc import Callable

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import Node
from jaxdiff.solvers.ddim import ddim
from jaxdiff.solvers.ddpm import ddpm
from jaxdiff.solvers.grids import GRIDS, make_grid
from jaxdiff.solvers.table import SolverTable

SOLVERS: dict[str, Callable[[Node], SolverTable]] = {
    "ddpm": ddpm,
    "ddpm_large": lambda grid: ddpm(grid, variance="large"),
    "ddim": ddim,
}
"""Name to solver; `eta` is an option of "ddim" alone."""


def make_table(solver: str, grid: Node, eta: float = 0.0) -> SolverTable:
    """The table of a solver by name on a grid.

    Raises JaxdiffError for an unknown name, and for an eta given to a solver that has none.
    """
    if solver not in SOLVERS:
        raise JaxdiffError(f"There is no solver {solver!r}; there are {', '.join(SOLVERS)}.")
    if solver == "ddim":
        return ddim(grid, eta)
    if eta:
        raise JaxdiffError(f"eta is an option of the solver 'ddim', and {solver!r} has none.")
    return SOLVERS[solver](grid)


__all__ = ["GRIDS", "SOLVERS", "SolverTable", "ddim", "ddpm", "make_grid", "make_table"]
