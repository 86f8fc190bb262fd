"""The SDE of a process: its published coefficients, its marginals, its score, and how it runs backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.mixture import MIXTURE
from scipy.integrate import solve_ivp

from jaxdiff.losses import diffusion_loss
from jaxdiff.ode import solve_ode
from jaxdiff.schedules import DiffusionSchedule, discrete_process, linear_beta_schedule, make_process, node_at
from jaxdiff.sde import coefficients, reverse_sde, score

BETA = lambda t: 0.1 + 19.9 * t  # noqa: E731
DEPTH = lambda t: 0.1 * t + 19.9 * t**2 / 2  # the integral of it  # noqa: E731
SDES = {
    "vp": (lambda t: -BETA(t) / 2, lambda t: BETA(t) ** 0.5),
    "subvp": (lambda t: -BETA(t) / 2, lambda t: (BETA(t) * (1 - np.exp(-2 * DEPTH(t)))) ** 0.5),
    "ve": (lambda t: 0 * t, lambda t: 0.01 * 5000**t * np.sqrt(2 * np.log(5000))),
    "edm": (lambda t: 0 * t, lambda t: np.sqrt(2 * t)),
    "flow": (lambda t: -1 / (1 - t), lambda t: np.sqrt(2 * t / (1 - t))),
}
"""f and g as Song et al. 2021 have them for the first three; of the last two as they follow from x_t by hand."""


@pytest.mark.parametrize("name", SDES)
def test_the_coefficients_are_the_published_ones(name):
    t = np.linspace(0.01, 0.99, 50)
    with jax.enable_x64(True):
        found = coefficients(make_process(name), t)
    for ours, theirs in zip(found, SDES[name], strict=True):
        np.testing.assert_allclose(ours, theirs(t), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(coefficients(make_process(name), 0.5).diffusion, SDES[name][1](0.5), rtol=1e-4)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_row_of_betas_is_a_slope(zero_terminal_snr):
    betas = linear_beta_schedule(1000)
    process = make_process("linear", zero_terminal_snr=zero_terminal_snr)
    if zero_terminal_snr:
        found = jax.jit(lambda t: coefficients(process, t))(jnp.array([0.0, 500.0, 998.0]))
        assert np.isfinite(jnp.array(found)).all()
        return
    with jax.enable_x64(True):
        found = coefficients(discrete_process(DiffusionSchedule.from_betas(betas)), np.arange(1.0, 1000))
    np.testing.assert_allclose(found.drift, 0.5 * np.log1p(-betas[1:]), rtol=1e-9)
    np.testing.assert_allclose(found.diffusion, np.sqrt(-np.log1p(-betas[1:])), rtol=1e-9)


@pytest.mark.parametrize("name", [*SDES, "cosine"])
def test_mean_and_variance_follow_the_sde(name):
    """Forward from t_min: d alpha = f alpha dt and d sigma^2 = (2 f sigma^2 + g^2) dt."""
    process = make_process(name, 10) if name == "cosine" else make_process(name)
    ends = (process.t_min, process.t_min + 0.7 * (process.t_max - process.t_min))
    rate = jax.jit(lambda t: coefficients(process, t))

    def derivative(t, state):
        f, g = (float(c) for c in rate(t))
        return [f * state[0], 2 * f * state[1] + g**2]

    alpha, sigma = process.alpha_sigma(np.array(ends[0]))
    with jax.enable_x64(True):
        found = solve_ivp(derivative, ends, [alpha, sigma**2], rtol=1e-8, atol=1e-10, max_step=np.diff(ends)[0] / 20)
    expected = process.alpha_sigma(np.array(ends[1]))
    np.testing.assert_allclose([found.y[0, -1], found.y[1, -1] ** 0.5], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "subvp", "ve", "flow"])
def test_the_score_is_the_gradient_of_the_log_density(name):
    process = make_process(name)
    node = node_at(process, np.linspace(process.t_min + 0.3 * (process.t_max - process.t_min), process.t_max, 4))
    x = np.hypot(node.alpha, node.sigma)[:, None] * np.random.default_rng(0).standard_normal((4, 2))
    with jax.enable_x64(True):
        gradient = jax.grad(lambda x: MIXTURE.log_density(x, node).sum())(jnp.asarray(x))
        np.testing.assert_allclose(score(MIXTURE.denoiser, jnp.asarray(x), node), gradient, rtol=1e-8, atol=1e-10)


def test_denoising_score_matching_is_the_loss_that_exists():
    """Vincent 2011: |s(x_t) - grad log q(x_t | x_0)|^2 is the plain loss of "score", sigma^2 of it that of "eps"."""
    process = make_process("linear")
    rng = np.random.default_rng(0)
    x_0, noise = (rng.standard_normal((6, 4, 4, 1)).astype(np.float32) for _ in range(2))
    t = jnp.array([50.0, 200.0, 400.0, 600.0, 800.0, 999.0])
    alpha, sigma = (np.asarray(c)[:, None, None, None] for c in process.alpha_sigma(t))
    network = lambda x, c_noise, cond: jnp.tanh(x) * jnp.cos(c_noise)[:, None, None, None]  # noqa: E731
    as_score = diffusion_loss(network, process, x_0, t, noise, prediction="score")
    q_score = -noise / sigma  # of N(alpha x_0, sigma^2) at x_t
    x_t = alpha * x_0 + sigma * noise
    matching = np.mean((network(x_t, t, None) - q_score) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(as_score, matching, rtol=1e-5)
    as_noise = diffusion_loss(lambda x, c, cond: -sigma * network(x, c, cond), process, x_0, t, noise, prediction="eps")
    np.testing.assert_allclose(as_noise, sigma[:, 0, 0, 0] ** 2 * matching, rtol=1e-4)


def test_the_reverse_without_noise_is_the_probability_flow():
    process = make_process("vp")
    x = np.random.default_rng(0).standard_normal((4, 2))
    with jax.enable_x64(True):
        run = jax.jit(lambda x, t: reverse_sde(MIXTURE.denoiser, process, 0.0)(x, t))

        def derivative(t, x):
            drift, diffusion = run(x.reshape(-1, 2), t)
            assert float(diffusion) == 0
            return np.asarray(drift).ravel()

        found = solve_ivp(derivative, (1.0, 0.1), x.ravel(), "DOP853", rtol=1e-9, atol=1e-9).y[:, -1]
        expected = jax.jit(lambda x: solve_ode(MIXTURE.denoiser, process, x, 1.0, 0.1, rtol=1e-9, atol=1e-9).x)(x)
    np.testing.assert_allclose(found.reshape(-1, 2), expected, atol=1e-6)


@pytest.mark.parametrize("noise_scale", [0.5, 1.0])
def test_the_reverse_keeps_the_marginals_whatever_its_noise(noise_scale):
    """By Euler and Maruyama's method written here, from t_max to 0.2, with a time for each example."""
    process, num, steps = make_process("vp"), 4000, 400
    step = reverse_sde(MIXTURE.denoiser, process, noise_scale)

    def body(x, row):
        t, key = row
        drift, diffusion = step(x, jnp.full(num, t))
        noise = jax.random.normal(key, x.shape)
        return x - drift * dt + diffusion[:, None] * jnp.sqrt(dt) * noise, None

    times = np.linspace(1.0, 0.2, steps + 1)
    dt = times[0] - times[1]
    keys = jax.random.split(jax.random.key(0), steps)
    x, _ = jax.jit(lambda x: jax.lax.scan(body, x, (times[:-1], keys)))(jax.random.normal(jax.random.key(1), (num, 2)))
    alpha, sigma = process.alpha_sigma(np.array(0.2))
    np.testing.assert_allclose(x.mean(0), alpha * MIXTURE.mean(), atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), alpha**2 * MIXTURE.covariance() + sigma**2 * np.eye(2), atol=0.05)
