"""Fidelity apart from diversity: precision, recall, density and coverage by nearest neighbours among features."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import JaxdiffError

BLOCK = 1024
"""Rows of distances that are held at a time."""


class Neighbours(NamedTuple):
    """What `neighbours` found; all but density lie in [0, 1], and density near 1 is as dense as the real set is.

    precision: the share of what is drawn that lies among the real. recall: the share of the real among what is drawn.
    density: how many real samples' neighbourhoods hold what is drawn, over k. coverage: the share of the real whose
    neighbourhood holds something drawn.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbours(real: Float[np.ndarray, "N F"], drawn: Float[np.ndarray, "M F"], k: int = 5) -> Neighbours:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), in float64.

    A sample's neighbourhood is the ball that reaches to its k-th nearest other of the same set. k: one number for all
    four, 5 as in the later paper; the earlier took 3 at 50,000 samples.
    Raises JaxdiffError for different numbers of features, and unless 1 <= k < N, M.
    """
    real, drawn = (np.asarray(features, np.float64) for features in (real, drawn))
    if real.shape[1:] != drawn.shape[1:] or real.ndim != 2:
        raise JaxdiffError(f"Features of shapes {real.shape} and {drawn.shape} do not compare: both are [N, F].")
    if not 1 <= k < min(len(real), len(drawn)):
        raise JaxdiffError(
            f"A k-th neighbour, k = {k}, needs more than k samples of each, and there are {len(real)} and {len(drawn)}."
        )
    centre = real.mean(0)  # distances by products lose digits to what is far from 0
    real, drawn = real - centre, drawn - centre
    radius_real, radius_drawn = _radii(real, k), _radii(drawn, k)
    inside_real, recalled, covered = [], [], []
    for rows, distances in _distances(real, drawn):
        inside = distances <= radius_real[rows, None]
        inside_real.append(inside.sum(0))
        covered.append(inside.any(1))
        recalled.append((distances <= radius_drawn).any(1))
    inside_real = np.sum(inside_real, 0)
    return Neighbours(
        precision=float(np.mean(inside_real > 0)),
        recall=float(np.mean(np.concatenate(recalled))),
        density=float(np.mean(inside_real) / k),
        coverage=float(np.mean(np.concatenate(covered))),
    )


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of some rows of x from all of y, and which rows."""
    for begin in range(0, len(x), BLOCK):
        rows = slice(begin, begin + BLOCK)
        distances = np.sum(x[rows] ** 2, 1)[:, None] + np.sum(y**2, 1) - 2 * x[rows] @ y.T
        yield rows, np.maximum(distances, 0)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance of each row's k-th nearest other [N]; the nearest of all is the row itself."""
    return np.concatenate([np.partition(distances, k, axis=1)[:, k] for _, distances in _distances(x, x)])
