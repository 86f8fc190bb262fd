"""Precision, recall, density and coverage against the papers' definitions read aloud, and where they must part."""

import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.metrics import neighbours
from jaxdiff.metrics import neighbours as neighbours_of

RNG = np.random.default_rng(0)


def by_definition(real, drawn, k):
    distance = lambda a, b: float(np.linalg.norm(a - b))  # noqa: E731
    radius = lambda z: [sorted(distance(a, b) for b in z)[k] for a in z]  # noqa: E731
    of_real, of_drawn = radius(real), radius(drawn)
    inside = np.array([[distance(r, d) <= radius for d in drawn] for r, radius in zip(real, of_real, strict=True)])
    precision = inside.any(0).mean()
    recall = np.mean([any(distance(r, d) <= q for d, q in zip(drawn, of_drawn, strict=True)) for r in real])
    return precision, recall, inside.sum() / (k * len(drawn)), inside.any(1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_definitions(k, monkeypatch):
    module = __import__("sys").modules["jaxdiff.metrics.neighbours"]
    monkeypatch.setattr(module, "BLOCK", 16)
    real, drawn = 50 + RNG.standard_normal((40, 3)), 50.5 + 0.8 * RNG.standard_normal((33, 3))
    np.testing.assert_allclose(neighbours(real, drawn, k), by_definition(real, drawn, k), rtol=1e-12)


def test_what_is_real_has_all_and_what_is_elsewhere_nothing():
    real = RNG.standard_normal((200, 4))
    copies = neighbours(real, real, 3)
    assert copies[:2] == (1, 1)
    assert copies.coverage == 1
    np.testing.assert_allclose(copies.density, (3 + 1) / 3, atol=0.4)  # each lies in its own neighbourhood as well
    assert neighbours(real, real + 100, 3) == (0, 0, 0, 0)


def test_a_lost_mode_costs_recall_and_coverage_alone_and_noise_precision_alone():
    centres = np.array([[-10.0, 0], [10.0, 0]])
    both = lambda num: centres[RNG.integers(0, 2, num)] + RNG.standard_normal((num, 2))  # noqa: E731
    real = both(600)
    one_mode = neighbours(real, centres[0] + RNG.standard_normal((600, 2)))
    assert one_mode.precision > 0.9
    assert 0.4 < one_mode.recall < 0.6
    assert 0.4 < one_mode.coverage < 0.6
    noisy = neighbours(real, np.concatenate([both(600), 40 * RNG.standard_normal((600, 2))]))
    assert noisy.precision < 0.7
    assert noisy.recall > 0.9
    assert noisy.coverage > 0.9


def test_what_does_not_compare_is_told():
    for real, drawn, k, said in (
        (np.zeros((9, 3)), np.zeros((9, 2)), 3, "do not compare"),
        (np.zeros((9, 3)), np.zeros((3, 3)), 3, "k = 3, needs more than k samples of each, and there are 9 and 3"),
        (np.zeros((9, 3)), np.zeros((9, 3)), 0, "k = 0"),
    ):
        with pytest.raises(JaxdiffError, match=said):
            neighbours_of(real, drawn, k)
