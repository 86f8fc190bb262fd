"""DDIM (Song et al. 2021a, equation 12) between any nodes of any process."""

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import Node
from jaxdiff.solvers.table import SolverTable, one_image_table, transition


def ddim(grid: Node, eta: float = 0.0) -> SolverTable:
    """Step along the predicted x_0 and the noise that it implies, on N + 1 nodes from noise to data.

    eta in [0, 1] scales the fresh noise (equation 16): 0 is deterministic (and is Euler's method for the flow
    process), 1 is `ddpm` with the small variance. Raises JaxdiffError outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise JaxdiffError(f"eta must lie in [0, 1], and {eta} does not.")
    _, variance_ts = transition(grid)
    sigma_t, sigma_s = grid.sigma[:-1], grid.sigma[1:]
    fresh = eta * np.sqrt(variance_ts) * sigma_s / sigma_t
    of_eps = np.sqrt(sigma_s**2 - fresh**2)
    return one_image_table(  # eps = (x - alpha_t D) / sigma_t
        grid,
        of_x=of_eps / sigma_t,
        of_x0=grid.alpha[1:] - of_eps * grid.alpha[:-1] / sigma_t,
        of_noise=fresh,
    )
