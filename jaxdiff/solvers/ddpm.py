"""DDPM's ancestral sampling (Ho et al. 2020, algorithm 2) between any nodes of any process."""

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import Node
from jaxdiff.solvers.table import SolverTable, one_image_table, transition


def ddpm(grid: Node, variance: str = "small") -> SolverTable:
    """Draw x_s from q(x_s | x_t, x_0 = D) (equations 6 and 7), on N + 1 nodes from noise to data.

    variance: "small" is the posterior's own, beta_tilde; "large" is beta (section 3.2: right for data that is a point
    and data that is white noise, respectively). The last row, to clean data, adds none.
    Raises JaxdiffError for another variance.
    """
    alpha_ts, variance_ts = transition(grid)
    variance_t, variance_s = grid.sigma[:-1] ** 2, grid.sigma[1:] ** 2
    if variance not in ("small", "large"):
        raise JaxdiffError(f"The variance of ddpm is 'small' or 'large', not {variance!r}.")
    posterior_variance = variance_ts * variance_s / variance_t
    large = np.where(variance_s > 0, variance_ts, 0.0)
    return one_image_table(
        grid,
        of_x=alpha_ts * variance_s / variance_t,
        of_x0=grid.alpha[1:] * variance_ts / variance_t,
        of_noise=np.sqrt(posterior_variance if variance == "small" else large),
    )
