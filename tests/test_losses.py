"""Times, weights and the loss against formulas written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdiff.errors import JaxdiffError
from jaxdiff.losses import diffusion_loss, loss_weight, stratify, time_from_uniform
from jaxdiff.preconditioning import PREDICTIONS, precondition
from jaxdiff.schedules import logsnr, make_process, node_at

U = jnp.asarray(np.random.default_rng(0).uniform(size=20_000), jnp.float32)


def test_stratified_draws_fall_one_into_each_cell():
    u = np.sort(stratify(jnp.float32(0.73), jnp.arange(64), 64))
    np.testing.assert_array_equal(np.floor(u * 64), np.arange(64))
    parts = [stratify(jnp.float32(0.73), jnp.arange(i, i + 16), 64) for i in range(0, 64, 16)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), u)


def test_discrete_uniform_times_are_all_rows_alike():
    t = time_from_uniform(make_process("linear", 10), U)
    counts = np.bincount(np.asarray(t, int), minlength=10)
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-3
    assert time_from_uniform(make_process("linear", 10), jnp.float32([1.0]))[0] == 9


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_continuous_uniform_times_fill_the_range(schedule):
    process = make_process(schedule)
    t = time_from_uniform(process, U)
    expected = stats.uniform(process.t_min, process.t_max - process.t_min)
    assert stats.kstest(np.asarray(t, float), expected.cdf).pvalue > 1e-3


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_lognormal_times_have_lognormal_noise_levels(schedule):
    process = make_process(schedule)
    t = time_from_uniform(process, U, "lognormal", mean=-0.4, std=1.0)
    node = node_at(process, t)
    log_ratio = -0.5 * np.asarray(logsnr(node.alpha, node.sigma), float)
    assert stats.kstest(log_ratio, stats.norm(-0.4, 1.0).cdf).pvalue > 1e-3


def test_lognormal_times_of_a_discrete_process_are_rows():
    t = np.asarray(time_from_uniform(make_process("cosine"), U, "lognormal"))
    assert np.all(t == np.round(t))
    assert 0 <= t.min() < t.max() <= 999


def test_weights_by_the_papers():
    sigma = jnp.float32([0.1, 0.8, 0.99])
    alpha = jnp.sqrt(1 - sigma**2)
    snr = np.asarray((alpha / sigma) ** 2)
    out = lambda prediction: precondition(prediction, alpha, sigma).c_out  # noqa: E731
    np.testing.assert_allclose(loss_weight("min_snr", alpha, sigma, out("eps")), np.minimum(snr, 5) / snr, rtol=1e-5)
    np.testing.assert_allclose(loss_weight("min_snr", alpha, sigma, out("x0")), np.minimum(snr, 5), rtol=1e-5)
    v = np.minimum(snr, 5) / (snr + 1)
    np.testing.assert_allclose(loss_weight("min_snr", alpha, sigma, out("v")), v, rtol=1e-5)
    np.testing.assert_allclose(loss_weight("snr", alpha, sigma, out("eps")), 1, rtol=1e-5)
    # Karras et al.: lambda(sigma) c_out^2 = 1
    edm = precondition("edm", jnp.ones(3), sigma, 0.5).c_out
    np.testing.assert_allclose(loss_weight("edm", jnp.ones(3), sigma, edm, sigma_data=0.5), 1, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_weight_on_x_0_means_the_same_for_every_prediction(prediction):
    process = make_process("cosine")
    rng = np.random.default_rng(1)
    x_0, noise, wrong = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(3))
    t = jnp.float32([100, 300, 500, 700])
    node = node_at(process, t)
    p = precondition(prediction, node.alpha, node.sigma)
    off = lambda x, c_noise, cond: p.a[:, None] * x_0 + p.b[:, None] * noise + wrong / p.c_out[:, None]  # noqa: E731
    loss = diffusion_loss(off, process, x_0, t, noise, prediction=prediction, weighting="snr")
    np.testing.assert_allclose(loss, (node.alpha / node.sigma) ** 2 * jnp.mean(wrong**2, -1), rtol=1e-3)


def test_plain_eps_loss_is_l_simple():
    process = make_process("linear")
    rng = np.random.default_rng(2)
    x_0, noise = rng.normal(size=(2, 3, 4))
    t = np.array([0, 400, 999])
    ab = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t][:, None]
    network = lambda x, c_noise, cond: 0.3 * x + c_noise[:, None] / 1000  # noqa: E731
    output = 0.3 * (ab**0.5 * x_0 + (1 - ab) ** 0.5 * noise) + t[:, None] / 1000
    loss = diffusion_loss(network, process, jnp.float32(x_0), jnp.float32(t), jnp.float32(noise))
    np.testing.assert_allclose(loss, np.mean((output - noise) ** 2, axis=1), rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp", "edm", "flow"])
def test_any_prediction_learns_under_any_schedule(prediction, schedule):
    """An affine network for Gaussian data: its best x_0 is known, and gradient descent on the loss finds it."""
    process, mean, std = make_process(schedule), 0.4, 0.5
    node = node_at(process, process.time_at(jnp.float32([0.5])))  # a noise level of moderate size
    key = jax.random.key(0)
    x_0 = mean + std * jax.random.normal(key, (4096, 1))
    noise = jax.random.normal(jax.random.fold_in(key, 1), x_0.shape)
    t = jnp.broadcast_to(jnp.round(node.t) if process.timesteps else node.t, 4096)
    node = node_at(process, t[:1])

    def loss(weights):
        network = lambda x, c_noise, cond: weights[0] * x + weights[1]  # noqa: E731
        return diffusion_loss(network, process, x_0, t, noise, prediction=prediction).mean()

    step = jax.jit(lambda w: w - 0.3 * jax.grad(loss)(w) / jnp.maximum(jax.hessian(loss)(w)[0, 0], 1.0))
    weights = jnp.zeros(2)
    for _ in range(300):
        weights = step(weights)
    p = precondition(prediction, node.alpha, node.sigma)
    for x_t in (-1.0, 2.0):  # E[x_0 | x_t] of a Gaussian
        gain = node.alpha * std**2 / ((node.alpha * std) ** 2 + node.sigma**2)
        exact = mean + gain * (x_t - node.alpha * mean)
        got = p.c_skip * x_t + p.c_out * (weights[0] * p.c_in * x_t + weights[1])
        np.testing.assert_allclose(got, exact, atol=0.05)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: time_from_uniform(make_process("vp"), U, "normal"), "uniform, lognormal"),
        (lambda: loss_weight("p2", U, U, U), "plain, snr, min_snr, edm"),
    ],
)
def test_mistakes_are_told(make, said):
    with pytest.raises(JaxdiffError, match=said):
        make()
