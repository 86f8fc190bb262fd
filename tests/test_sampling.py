"""The scan: against a loop, on data whose exact denoiser is known, and as one compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.sampling import (
    example_keys,
    initial_noise,
    noised,
    row_noise,
    sample,
    sample_ddim,
    sample_ddpm,
    slerp,
)
from jaxdiff.schedules import DiffusionSchedule, Node, linear_beta_schedule, make_process
from jaxdiff.solvers import SolverTable, ddim, ddpm, make_grid, make_table, tail

MEAN = np.array([0.5, -0.3])
COVARIANCE = np.array([[1.0, 0.6], [0.6, 0.8]])
KEYS = example_keys(jax.random.key(0), jnp.arange(20_000))


def gaussian_denoiser(x: jax.Array, node: Node) -> jax.Array:
    """E[x_0 | x_t] [B, 2] of the Gaussian above."""
    gain = node.alpha * COVARIANCE @ jnp.linalg.inv(node.alpha**2 * COVARIANCE + node.sigma**2 * jnp.eye(2))
    return MEAN + (x - node.alpha * MEAN) @ gain.T


def gaussian_noise(schedule: DiffusionSchedule, x: jax.Array, t: jax.Array) -> jax.Array:
    """E[eps | x_t] of the same: what a perfect model(x, t) answers."""
    ab = jnp.asarray(schedule.alphas_cumprod, jnp.float32)[t[0].astype(int)]
    node = Node(t[0], jnp.sqrt(ab), jnp.sqrt(1 - ab))
    return (x - node.alpha * gaussian_denoiser(x, node)) / node.sigma


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_recovers_a_gaussian(variance):
    schedule = DiffusionSchedule.from_betas(linear_beta_schedule(1000))
    model = partial(gaussian_noise, schedule)
    drawn = sample_ddpm(model, schedule, (20_000, 2), jax.random.key(1), variance=variance, clip=False)
    np.testing.assert_allclose(drawn.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), COVARIANCE, atol=0.04)


def moments(table: SolverTable) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance that a one-image table gives on this Gaussian, without sampling: float64, row by row."""
    mean, covariance = np.zeros(2), (table.alpha[0] ** 2 + table.sigma[0] ** 2) * np.eye(2)
    for alpha, sigma, M, v, n in zip(table.alpha, table.sigma, table.M, table.v, table.n, strict=True):
        gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
        step = M[0, 0] * np.eye(2) + v[0] * gain
        mean = step @ mean + v[0] * (MEAN - alpha * gain @ MEAN)
        covariance = step @ covariance @ step.T + n[0] ** 2 * np.eye(2)
    return mean, covariance


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_recovers_a_gaussian(eta):
    """In 50 steps 7 to 9 % of the variance is lost to the step size, and none to anything else."""
    schedule = DiffusionSchedule.from_betas(linear_beta_schedule(1000))
    model = partial(gaussian_noise, schedule)
    drawn = sample_ddim(model, schedule, (20_000, 2), jax.random.key(2), num_steps=50, eta=eta, clip=False)
    np.testing.assert_allclose(drawn.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), COVARIANCE, rtol=0.12)
    mean, covariance = moments(ddim(make_grid(make_process("linear"), 50), eta))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.03)


@pytest.mark.parametrize(
    ("schedule", "spacing"), [("cosine", "linspace"), ("vp", "trailing"), ("flow", "trailing"), ("edm", "karras")]
)
def test_ddim_converges_to_the_gaussian(schedule, spacing):
    """The error of mean and covariance falls as 1 / num_steps, to nothing."""

    def error(num_steps):
        mean, covariance = moments(ddim(make_grid(make_process(schedule), num_steps, spacing)))
        return max(np.abs(mean - MEAN).max(), np.abs(covariance - COVARIANCE).max())

    assert error(800) < 0.01
    assert 1.7 < error(200) / error(400) < 2.3


@pytest.mark.parametrize(("schedule", "spacing"), [("vp", "trailing"), ("flow", "trailing"), ("edm", "karras")])
def test_continuous_processes_recover_a_gaussian(schedule, spacing):
    table = ddim(make_grid(make_process(schedule), 100, spacing))
    drawn = sample(gaussian_denoiser, table, initial_noise(table, KEYS, (2,)), KEYS)
    mean, covariance = moments(table)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.03)


def test_the_course_s_samplers_clip_where_asked():
    schedule = DiffusionSchedule.from_betas(linear_beta_schedule(20))
    for draw in (sample_ddpm, partial(sample_ddim, num_steps=5)):
        drawn = draw(lambda x, t: -5 * x, schedule, (4, 3, 3, 1), jax.random.key(0))
        assert jnp.abs(drawn).max() <= 1
        drawn = draw(lambda x, t: -5 * x, schedule, (4, 3, 3, 1), jax.random.key(0), clip=False)
        assert jnp.abs(drawn).max() > 1


def test_the_scan_equals_a_loop_over_rows_of_several_images():
    """A made-up table with m = 3, full matrices, and noise in all rows but one, followed by hand."""
    rng = np.random.default_rng(0)
    n, m = 4, 3
    table = SolverTable(*rng.uniform(0.1, 1, (3, n)), rng.normal(size=(n, m, m)) / 2, *rng.normal(size=(2, n, m)))
    table.n[1] = 0
    denoise = lambda x, node: jnp.tanh(x) * node.alpha + node.sigma * node.t  # noqa: E731
    keys = example_keys(jax.random.key(3), jnp.arange(2))
    x = initial_noise(table, keys, (5,))
    S = np.zeros((m, 2, 5))
    S[0] = x
    xs, x0s = [], []
    for i in range(n):
        D = np.tanh(S[0]) * table.alpha[i] + table.sigma[i] * table.t[i]
        z = np.asarray(row_noise(keys, i, (5,)), float)
        S = np.stack([sum(table.M[i, j, k] * S[k] for k in range(m)) + table.v[i, j] * D + table.n[i, j] * z
                      for j in range(m)])  # fmt: skip
        xs.append(S[0])
        x0s.append(D)
    drawn, trajectory = sample(denoise, table, x, keys, trajectory=True)
    np.testing.assert_allclose(drawn, S[0], rtol=1e-5)
    np.testing.assert_allclose(trajectory.x, xs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trajectory.x0, x0s, rtol=1e-4, atol=1e-5)


def test_an_example_s_noise_is_its_own():
    table = ddpm(make_grid(make_process("linear"), 8))
    draw = lambda keys: sample(gaussian_denoiser, table, initial_noise(table, keys, (2,)), keys)  # noqa: E731
    np.testing.assert_allclose(draw(KEYS[:6])[4:], draw(KEYS[4:6]), rtol=1e-5, atol=1e-6)
    assert len(np.unique(initial_noise(table, KEYS[:100], (1,)))) == 100
    assert not np.array_equal(row_noise(KEYS[:2], 0, (2,)), row_noise(KEYS[:2], 1, (2,)))


def test_initial_noise_has_the_marginal_s_scale():
    for name, expected in (("linear", 1.0), ("edm", 80.0), ("flow", 0.999)):
        table = ddim(make_grid(make_process(name), 5))
        np.testing.assert_allclose(initial_noise(table, KEYS, (2,)).std(), expected, rtol=0.01)


@pytest.mark.parametrize("schedule", ["linear", "edm"])
def test_noised_images_have_the_signal_and_the_noise_of_the_first_node(schedule):
    table = ddim(tail(make_grid(make_process(schedule), 10), 0.4))
    x_0 = jnp.broadcast_to(jnp.float32(MEAN), (20_000, 2))
    x = noised(table, x_0, KEYS)
    alpha, sigma = table.alpha[0], table.sigma[0]
    np.testing.assert_allclose(x.mean(0), alpha * MEAN, atol=5 * sigma / np.sqrt(20_000))
    np.testing.assert_allclose(x.std(0), sigma, rtol=0.03)
    z = initial_noise(table, KEYS, (2,)) / np.hypot(alpha, sigma)
    np.testing.assert_allclose(x, alpha * MEAN + sigma * z, rtol=1e-5, atol=1e-5 * sigma)
    np.testing.assert_allclose(noised(table, x_0[4:6], KEYS[4:6]), x[4:6], rtol=1e-6)


@pytest.mark.parametrize(("solver", "schedule"), [("heun", "linear"), ("dpmpp_2m_sde", "flow")])
def test_from_images_with_noise_come_images_of_the_same_distribution(solver, schedule):
    """And the more of the steps are taken, the less each is like the one that it began as."""
    root = np.linalg.cholesky(COVARIANCE)
    images = jnp.float32(MEAN + np.random.default_rng(0).normal(size=(20_000, 2)) @ root.T)
    grid = make_grid(make_process(schedule), 100)
    kept = []
    for strength in (0.3, 0.8):
        table = make_table(solver, tail(grid, strength))
        drawn = sample(gaussian_denoiser, table, noised(table, images, KEYS), KEYS)
        np.testing.assert_allclose(drawn.mean(0), MEAN, atol=0.03)
        np.testing.assert_allclose(np.cov(drawn.T), COVARIANCE, atol=0.04)
        kept.append(np.corrcoef(images[:, 0], drawn[:, 0])[0, 1])
    assert 1 > kept[0] > kept[1] + 0.2


def test_slerp_is_the_formula_of_each_example():
    a, b = jax.random.normal(KEYS[0], (2, 3, 4, 5))
    weight = np.array([0.0, 0.3, 1.5])
    expected = []
    for x, y, w in zip(np.float64(a), np.float64(b), weight, strict=True):
        angle = np.arccos((x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y)))
        expected.append((np.sin((1 - w) * angle) * x + np.sin(w * angle) * y) / np.sin(angle))
    np.testing.assert_allclose(slerp(a, b, jnp.asarray(weight)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slerp(a, b, 0.3)[1], expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slerp(a, b, 0), a, rtol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1), b, rtol=1e-6)


def test_slerp_keeps_the_length_of_noise():
    a, b = jnp.eye(2, 6)[:, None]
    between = jnp.stack([slerp(a, b, w)[0] for w in (0.1, 0.5, 0.8)])
    np.testing.assert_allclose(jnp.linalg.norm(between, axis=1), 1, rtol=1e-6)
    a, b = jax.random.normal(KEYS[0], (2, 4, 10_000))
    np.testing.assert_allclose(slerp(a, b, 0.5).std(1), 1, atol=0.03)
    assert ((a + b) / 2).std() < 0.8  # as a mean would not


PARALLEL = jax.random.normal(KEYS[0], (2, 7))


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0])
def test_slerp_of_parallel_noises_goes_along_the_line(factor):
    between = slerp(PARALLEL, factor * PARALLEL, jnp.float32([0.3, 0.9]))
    weight = np.array([[0.3], [0.9]])
    np.testing.assert_allclose(between, (1 - weight) * PARALLEL + weight * factor * PARALLEL, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0])
def test_slerp_s_gradient_is_finite_and_along_the_line_where_noises_are_parallel(factor):
    of_a, of_b = jax.grad(lambda a, b: slerp(a, b, 0.3).sum(), (0, 1))(PARALLEL, factor * PARALLEL)
    np.testing.assert_allclose(of_a, 0.7, rtol=1e-5)
    np.testing.assert_allclose(of_b, 0.3, rtol=1e-5)
