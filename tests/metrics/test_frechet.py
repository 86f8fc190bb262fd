"""The Frechet distance against closed forms and SciPy's matrix root, and how it tells real images from blurred ones."""

import numpy as np
import pytest
from scipy import linalg, ndimage

from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError
from jaxdiff.metrics import Moments, frechet_distance, merge, moments, moments_of

RNG = np.random.default_rng(0)


def exact(mean, covariance, count=1001):
    return Moments(count, np.asarray(mean, float), (count - 1) * np.asarray(covariance, float))


def test_linear_gaussian_cases_have_a_closed_form():
    """x ~ N(0, C) and A x + b: covariances that commute, and that do not, where the optimal map is known."""
    for a, b, expected in (
        (exact([0, 0], np.eye(2)), exact([3, 4], np.eye(2)), 25),
        (exact([1, 1], np.diag([4.0, 9.0])), exact([1, 1], np.diag([1.0, 25.0])), 1 + 4),
    ):
        np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-10)
    # From N(0, C) to its image under a symmetric positive A the optimal map is A, of the cost tr((A - 1) C (A - 1)).
    root = RNG.standard_normal((5, 5))
    covariance = root @ root.T
    other = RNG.standard_normal((5, 5))
    A = other @ other.T
    assert np.abs(A @ covariance - covariance @ A).max() > 1
    expected = np.trace((A - np.eye(5)) @ covariance @ (A - np.eye(5)))
    found = frechet_distance(exact(np.zeros(5), covariance), exact(np.zeros(5), A @ covariance @ A))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_it_agrees_with_scipy_on_random_features():
    a, b = (
        moments(RNG.standard_normal((400, 64)) @ RNG.standard_normal((64, 64)) + RNG.standard_normal(64)) for _ in "ab"
    )
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root.real)
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(frechet_distance(b, a), expected, rtol=1e-6)


def test_moments_come_together_from_batches_in_any_order():
    features = 1000 + RNG.standard_normal((100, 7)).astype(np.float32)  # far from 0, where sums of squares lose digits
    parts = np.split(features, [1, 30, 31, 80])
    whole = moments(features)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T.astype(float)), rtol=1e-10)
    for found in (moments_of(parts), merge(moments_of(parts[3:]), moments_of(parts[:3]))):
        assert found.count == 100
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-8, atol=1e-10)


def test_halves_of_the_digits_are_near_and_a_blurred_copy_is_not():
    digits = open_dataset("digits")
    images = digits.read(RNG.permutation(digits.size))["image"].astype(float) / 255
    one, other = (moments(half.reshape(len(half), -1)) for half in (images[::2], images[1::2]))
    blurred = moments(ndimage.gaussian_filter(images[1::2], (0, 0.7, 0.7, 0)).reshape(len(images[1::2]), -1))
    near = frechet_distance(one, other)
    spread = np.trace(one.covariance)  # the squared distance from all images' mean
    assert 0 <= near < 0.02 * spread
    assert frechet_distance(one, blurred) > 10 * near
    np.testing.assert_allclose(frechet_distance(one, one), 0, atol=1e-6 * spread)


def test_what_does_not_compare_is_told():
    few, many = moments(RNG.standard_normal((4, 4))), moments(RNG.standard_normal((50, 4)))
    for call, said in (
        (lambda: frechet_distance(few, many), "4 features needs more samples than that, and there are 4"),
        (lambda: frechet_distance(many, moments(RNG.standard_normal((50, 5)))), "of 4 and of 5 features"),
        (lambda: moments(np.array([[1.0, np.nan]])), "not finite"),
        (lambda: moments(np.zeros((0, 3))), r"not one of shape \(0, 3\)"),
    ):
        with pytest.raises(JaxdiffError, match=said):
            call()
