"""The Frechet distance between two sets of features, by their means and covariances alone (Heusel et al. 2017, FID)."""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import JaxdiffError


class Moments(NamedTuple):
    """What is known of features: how many, their mean [F], and the sum of squares about it [F, F]; all float64."""

    count: int
    mean: Float[np.ndarray, " F"]
    scatter: Float[np.ndarray, "F F"]

    @property
    def covariance(self) -> Float[np.ndarray, "F F"]:
        """The unbiased covariance. Raises JaxdiffError for too few samples, of which it would be singular."""
        if self.count <= len(self.mean):
            raise JaxdiffError(
                f"The covariance of {len(self.mean)} features needs more samples than that, and there are {self.count}."
            )
        return self.scatter / (self.count - 1)


def moments(features: Float[np.ndarray, "N F"]) -> Moments:
    """The moments of features, in float64. Raises JaxdiffError for none, and for numbers that are not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features):
        raise JaxdiffError(f"Features are an array [N, F] of one or more rows, not one of shape {features.shape}.")
    if not np.isfinite(features).all():
        raise JaxdiffError("Among the features there are numbers that are not finite.")
    mean = features.mean(0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together (Chan et al. 1983): of batches, devices or hosts, in any order."""
    count = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.scatter + b.scatter + a.count * b.count / count * np.outer(shift, shift)
    return Moments(count, a.mean + b.count / count * shift, scatter)


def moments_of(batches: Iterable[Float[np.ndarray, "N F"]]) -> Moments:
    """The moments of features that come batch by batch, of which none is kept."""
    return reduce(merge, map(moments, batches))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared distance of two normals of these moments: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Dowson & Landau 1982; the "FID" where features are Inception's. Its bias is positive and falls as 1 / count
    (Binkowski et al. 2018), so only distances at equal counts compare.
    Raises JaxdiffError for different numbers of features, and for too few samples.
    """
    if len(a.mean) != len(b.mean):
        raise JaxdiffError(f"Moments of {len(a.mean)} and of {len(b.mean)} features do not compare.")
    # (C_a C_b)^(1/2) has the trace of the root of a symmetric matrix, whose eigenvalues are real as they should be.
    values, axes = np.linalg.eigh(a.covariance)
    root = axes * np.sqrt(np.maximum(values, 0)) @ axes.T
    shared = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + trace)
