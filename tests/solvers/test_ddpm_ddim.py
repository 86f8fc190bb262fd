"""One step of DDPM and of DDIM against NumPy float64, diffusers' steps, and each other."""

from pathlib import Path

import numpy as np
import pytest

from jaxdiff.schedules import make_process
from jaxdiff.solvers import ddim, ddpm, make_grid

REFERENCE = np.load(Path(__file__).parent.parent / "fixtures" / "schedules.npz")
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def apply(table, row, x, x0, z):
    """One row of a one-image table."""
    return table.M[row, 0, 0] * x + table.v[row, 0] * x0 + table.n[row, 0] * z


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_ddpm_step_equals_algorithm_2_and_diffusers(variance, t):
    table = ddpm(make_grid(make_process("linear"), 1000), variance)
    x, eps, z = REFERENCE["x"], REFERENCE["eps"], REFERENCE["noise"]
    ab = ALPHAS_CUMPROD[t]
    before = ALPHAS_CUMPROD[t - 1] if t else 1.0
    beta = 1 - ab / before
    sigma2 = beta if variance == "large" else beta * (1 - before) / (1 - ab)
    expected = (x - beta / np.sqrt(1 - ab) * eps) / np.sqrt(1 - beta) + (t > 0) * np.sqrt(sigma2) * z
    got = apply(table, 999 - t, x, (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab), z)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got, REFERENCE[f"ddpm/fixed_{variance}/t{t}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("t", [980, 500, 20, 0])
def test_ddim_step_equals_equation_12_and_diffusers(eta, t):
    table = ddim(make_grid(make_process("linear"), 50, "leading"), eta)
    x, eps, z = REFERENCE["x"], REFERENCE["eps"], REFERENCE["noise"]
    row = 49 - t // 20
    assert table.t[row] == t
    ab = ALPHAS_CUMPROD[t]
    before = ALPHAS_CUMPROD[t - 20] if t else 1.0
    x0 = (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
    sigma2 = eta**2 * (1 - before) / (1 - ab) * (1 - ab / before)
    expected = np.sqrt(before) * x0 + np.sqrt(1 - before - sigma2) * eps + np.sqrt(sigma2) * z
    got = apply(table, row, x, x0, z)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got, REFERENCE[f"ddim/eta{eta}/t{t}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "vp", "flow", "edm"])
def test_ddim_with_eta_1_is_ddpm_on_any_process(schedule):
    grid = make_grid(make_process(schedule), 12)
    for a, b in zip(ddim(grid, eta=1.0), ddpm(grid), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_ddim_on_the_flow_process_is_euler():
    process = make_process("flow")
    grid = make_grid(process, 7)
    table = ddim(grid)
    x, x0 = 0.7, -0.2
    for i in range(7):
        u = (x - x0) / grid.t[i]  # the velocity eps - x_0 of the straight path through both
        np.testing.assert_allclose(apply(table, i, x, x0, 0.0), x + (grid.t[i + 1] - grid.t[i]) * u, atol=1e-12)


def test_ddpm_keeps_the_marginals_of_a_point():
    """With D the true x_0, mean and variance follow q(x_t | x_0) exactly, on any grid."""
    grid = make_grid(make_process("cosine"), 10)
    table = ddpm(grid)
    mean, variance = grid.alpha[0] * 0.3, grid.sigma[0] ** 2
    for i in range(10):
        mean = apply(table, i, mean, 0.3, 0)
        variance = table.M[i, 0, 0] ** 2 * variance + table.n[i, 0] ** 2
        np.testing.assert_allclose([mean, variance], [0.3 * grid.alpha[i + 1], grid.sigma[i + 1] ** 2], atol=1e-12)
