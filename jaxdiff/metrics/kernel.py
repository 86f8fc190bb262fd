"""The kernel distance between two sets of features, unbiased at any size (Binkowski et al. 2018, KID)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import JaxdiffError

BLOCK = 2048
"""Rows of the kernel that are held at a time."""


class KernelDistance(NamedTuple):
    """An estimate of the squared maximum mean discrepancy, and its standard error."""

    value: float
    standard_error: float


def kernel_distance(x: Float[np.ndarray, "N F"], y: Float[np.ndarray, "M F"]) -> KernelDistance:
    """The unbiased squared discrepancy of features under the kernel (x . y / F + 1)^3 (Gretton et al. 2012, lemma 6).

    Over all pairs, in float64, and not over random subsets: the same features give the same number. The standard error
    is the jackknife's, by leaving out each row in turn, for which the sums of the kernel's rows are enough.
    Raises JaxdiffError for different numbers of features, and for fewer than two rows.
    """
    x, y = (np.asarray(features, np.float64) for features in (x, y))
    if x.shape[1:] != y.shape[1:] or x.ndim != 2:
        raise JaxdiffError(f"Features of shapes {x.shape} and {y.shape} do not compare: both are [N, F].")
    n, m = len(x), len(y)
    if min(n, m) < 3:  # leaving one out must leave a pair
        raise JaxdiffError(f"The kernel distance needs three or more samples of each, and there are {n} and {m}.")
    of_xx, of_yy = _row_sums(x, x) - _kernel(x, x), _row_sums(y, y) - _kernel(y, y)
    of_xy, of_yx = _row_sums(x, y), _row_sums(y, x)
    xx, yy, xy = of_xx.sum(), of_yy.sum(), of_xy.sum()
    value = xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
    without_x = (xx - 2 * of_xx) / ((n - 1) * (n - 2)) + yy / (m * (m - 1)) - 2 * (xy - of_xy) / ((n - 1) * m)
    without_y = xx / (n * (n - 1)) + (yy - 2 * of_yy) / ((m - 1) * (m - 2)) - 2 * (xy - of_yx) / (n * (m - 1))
    variance = sum((len(left) - 1) * left.var() for left in (without_x, without_y))
    return KernelDistance(float(value), float(np.sqrt(variance)))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row, [N]."""
    return (np.einsum("nf,nf->n", x, y) / x.shape[1] + 1) ** 3


def _row_sums(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of the kernel matrix of x and y, [N]."""
    blocks = (x[i : i + BLOCK] @ y.T for i in range(0, len(x), BLOCK))
    return np.concatenate([((block / x.shape[1] + 1) ** 3).sum(1) for block in blocks])
