"""What a solver is: a table whose rows are all that the sampling scan needs to know."""

from typing import NamedTuple

import numpy as np

from jaxdiff.schedules import Node


class SolverTable(NamedTuple):
    """N rows, one evaluation of the network each, over m images S (Butcher 1966's general linear methods).

    Row i evaluates D = denoise(S[0]; t_i, alpha_i, sigma_i) and sets S <- M_i S + v_i D + n_i z with z ~ N(0, I).
    t, alpha, sigma: [N]. M: [N, m, m]. v, n: [N, m]. All NumPy float64 where a solver makes them.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    M: np.ndarray
    v: np.ndarray
    n: np.ndarray

    @property
    def node(self) -> Node:
        """The nodes at which the rows evaluate."""
        return Node(self.t, self.alpha, self.sigma)


def one_image_table(grid: Node, of_x: np.ndarray, of_x0: np.ndarray, of_noise: np.ndarray) -> SolverTable:
    """The table of a method that remembers nothing: x <- of_x x + of_x0 D + of_noise z, each [N], on N + 1 nodes."""
    return SolverTable(*(field[:-1] for field in grid), M=of_x[:, None, None], v=of_x0[:, None], n=of_noise[:, None])


def transition(grid: Node) -> tuple[np.ndarray, np.ndarray]:
    """alpha_{t|s} and sigma^2_{t|s} [N] of q(x_t | x_s) between each node t and its next s (Kingma et al. 2021, 3.1).

    In DDPM's terms, from one row to the next, these are sqrt(1 - beta_t) and beta_t.
    """
    alpha = grid.alpha[:-1] / grid.alpha[1:]
    return alpha, grid.sigma[:-1] ** 2 - alpha**2 * grid.sigma[1:] ** 2
