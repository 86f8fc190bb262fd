"""The kernel distance against its definition, pair by pair, and its standard error against what it stands for."""

import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.metrics import kernel, kernel_distance

RNG = np.random.default_rng(0)


def by_pairs(x, y):
    """Gretton et al. 2012, lemma 6, as it is written."""
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    within = lambda z: sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)  # noqa: E731
    between = sum(k(a, b) for a in x for b in y)
    return within(x) / (n * (n - 1)) + within(y) / (m * (m - 1)) - 2 * between / (n * m)


def test_it_is_the_sum_over_pairs_and_its_error_the_jackknife_s(monkeypatch):
    x, y = RNG.standard_normal((14, 3)), 0.5 + RNG.standard_normal((11, 3))
    monkeypatch.setattr(kernel, "BLOCK", 4)
    found = kernel_distance(x, y)
    np.testing.assert_allclose(found.value, by_pairs(x, y), rtol=1e-12)
    without_x = np.array([by_pairs(np.delete(x, i, 0), y) for i in range(14)])
    without_y = np.array([by_pairs(x, np.delete(y, i, 0)) for i in range(11)])
    variance = 13 / 14 * np.sum((without_x - without_x.mean()) ** 2)
    variance += 10 / 11 * np.sum((without_y - without_y.mean()) ** 2)
    np.testing.assert_allclose(found.standard_error, variance**0.5, rtol=1e-9)


def test_it_is_unbiased_and_its_error_is_what_it_scatters():
    draws = lambda shift: [  # noqa: E731
        kernel_distance(RNG.standard_normal((60, 4)), shift + RNG.standard_normal((80, 4))) for _ in range(400)
    ]
    same, apart = np.array(draws(0.0)), np.array(draws(0.7))
    assert abs(same[:, 0].mean()) < 4 * same[:, 0].std() / 20
    assert apart[:, 0].mean() > 3 * apart[:, 0].std()
    assert 0.7 < apart[:, 1].mean() / apart[:, 0].std() < 1.4


def test_what_does_not_compare_is_told():
    for x, y, said in (
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\(5, 3\) and \(5, 4\) do not compare"),
        (np.zeros((2, 3)), np.zeros((5, 3)), "three or more samples of each, and there are 2 and 5"),
    ):
        with pytest.raises(JaxdiffError, match=said):
            kernel_distance(x, y)
