"""Schedules against formulas written out a second time in float64, and against diffusers' tables."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import schedules as s
from jaxdiff.errors import JaxdiffError

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "schedules.npz")
NAMES = {
    "linear": s.linear_beta_schedule,
    "scaled_linear": s.scaled_linear_beta_schedule,
    "sigmoid": s.sigmoid_beta_schedule,
}
PROCESSES = ["linear", "cosine", "scaled_linear", "sigmoid", "vp", "subvp", "ve", "edm", "flow"]


@pytest.mark.parametrize("name", NAMES)
def test_betas_equal_diffusers(name):
    np.testing.assert_allclose(NAMES[name](1000), REFERENCE[f"betas/{name}"], rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr_equals_diffusers(name):
    betas = s.rescale_zero_terminal_snr(NAMES[name](1000))
    np.testing.assert_allclose(betas, REFERENCE[f"betas/{name}_zero_snr"], rtol=1e-8)
    assert s.DiffusionSchedule.from_betas(betas).alphas_cumprod[-1] == 0


def test_cosine_betas_are_the_paper_s_and_clipped():
    betas = s.cosine_beta_schedule(1000)
    # the reference clips at 0.999 and has no lower bound: they agree where neither bound is reached
    np.testing.assert_allclose(betas[60:-1], REFERENCE["betas/squaredcos_cap_v2"][60:-1], rtol=1e-9)
    assert betas[0] == 1e-4
    assert betas[-1] == 0.9999
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    np.testing.assert_allclose(betas[500], 1 - f(501) / f(500), rtol=1e-12)


@pytest.mark.parametrize("make", [s.linear_beta_schedule, s.cosine_beta_schedule])
def test_tables_by_plain_loops(make):
    betas = make(50)
    schedule = s.DiffusionSchedule.from_betas(betas)
    product = 1.0
    for t, beta in enumerate(betas):
        before, product = product, product * (1 - beta)
        expected = {
            "betas": beta,
            "alphas": 1 - beta,
            "alphas_cumprod": product,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": product**0.5,
            "sqrt_one_minus_alphas_cumprod": (1 - product) ** 0.5,
            "sqrt_recip_alphas": (1 - beta) ** -0.5,
            "posterior_variance": beta * (1 - before) / (1 - product),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(schedule, name)[t], value, rtol=1e-12, err_msg=name)
    assert schedule._fields == tuple(expected)


def test_the_end_of_the_cosine_schedule_keeps_its_digits_on_the_device():
    schedule = s.DiffusionSchedule.from_betas(s.cosine_beta_schedule(1000))
    t = jnp.arange(990, 1000)
    x_0 = jnp.ones((10, 1))
    mean = jax.jit(s.q_sample)(schedule, x_0, t, jnp.zeros((10, 1)))[:, 0]
    np.testing.assert_allclose(mean, np.cumprod(1 - s.cosine_beta_schedule(1000))[990:] ** 0.5, rtol=2e-7)
    alpha, sigma = jax.jit(s.discrete_process(schedule).alpha_sigma)(t.astype(jnp.float32))
    np.testing.assert_allclose(alpha, schedule.sqrt_alphas_cumprod[990:], rtol=2e-6)
    np.testing.assert_allclose(sigma, schedule.sqrt_one_minus_alphas_cumprod[990:], rtol=2e-7)


def test_q_sample_and_posterior_equal_float64_numpy():
    betas = s.linear_beta_schedule(1000)
    schedule = s.DiffusionSchedule.from_betas(betas)
    rng = np.random.default_rng(0)
    x_0, noise = rng.normal(size=(2, 5, 4, 4, 1))
    t = np.array([0, 1, 500, 998, 999])
    alphas_cumprod = np.cumprod(1 - betas)
    wide = lambda v: v[:, None, None, None]  # noqa: E731
    ab, before = wide(alphas_cumprod[t]), wide(np.append(1.0, alphas_cumprod)[t])
    x_t = ab**0.5 * x_0 + (1 - ab) ** 0.5 * noise
    drawn = s.q_sample(schedule, jnp.float32(x_0), jnp.asarray(t), jnp.float32(noise))
    np.testing.assert_allclose(drawn, x_t, atol=1e-6)

    beta = wide(betas[t])
    mean = (before**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - before) * x_t) / (1 - ab)
    got_mean, got_variance = s.posterior_mean_variance(schedule, jnp.float32(x_0), jnp.float32(x_t), jnp.asarray(t))
    np.testing.assert_allclose(got_mean, mean, atol=2e-6)
    np.testing.assert_allclose(got_variance, beta * (1 - before) / (1 - ab), rtol=1e-6)


def test_a_time_past_the_end_is_not_a_wrong_row():
    schedule = s.DiffusionSchedule.from_betas(s.linear_beta_schedule(10))
    assert jnp.isnan(s.q_sample(schedule, jnp.ones((1, 2)), jnp.array([10]), jnp.ones((1, 2)))).all()


def test_score_and_noise_are_inverse():
    noise = jnp.arange(6.0).reshape(2, 3)
    sigma = jnp.array([0.5, 2.0])
    np.testing.assert_allclose(s.score_from_noise(noise, sigma)[1], -noise[1] / 2)
    np.testing.assert_allclose(s.noise_from_score(s.score_from_noise(noise, sigma), sigma), noise, rtol=1e-6)


def test_the_score_is_the_gradient_of_the_log_density():
    alpha, sigma, x_0, noise = 0.8, 0.6, 0.3, jnp.array([[-1.7]])
    log_q = lambda x: -0.5 * ((x - alpha * x_0) / sigma) ** 2  # noqa: E731
    x_t = alpha * x_0 + sigma * noise
    np.testing.assert_allclose(s.score_from_noise(noise, sigma), jax.grad(lambda x: log_q(x)[0, 0])(x_t), rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_time_at_inverts_logsnr(name):
    process = s.make_process(name)
    t = np.linspace(process.t_min, process.t_max, 101)
    node = s.node_at(process, t)
    np.testing.assert_allclose(process.time_at(s.logsnr(node.alpha, node.sigma)), t, rtol=1e-9, atol=1e-9)
    assert np.all(np.diff(s.snr(node.alpha, node.sigma)) < 0)


@pytest.mark.parametrize("name", PROCESSES)
def test_float32_under_jit_agrees_with_float64_on_the_host(name):
    process = s.make_process(name)
    t = np.linspace(process.t_min, process.t_max, 101).astype(np.float32)
    for device, host in zip(jax.jit(process.alpha_sigma)(t), process.alpha_sigma(t.astype(np.float64)), strict=True):
        np.testing.assert_allclose(device, host, rtol=3e-5)


def test_discrete_process_interpolates_log_alpha_bar():
    schedule = s.DiffusionSchedule.from_betas(s.linear_beta_schedule(1000))
    alpha, sigma = s.discrete_process(schedule).alpha_sigma(np.array([0.0, 10.5, 999.0]))
    ab = schedule.alphas_cumprod
    np.testing.assert_allclose(alpha**2, [ab[0], (ab[10] * ab[11]) ** 0.5, ab[999]], rtol=1e-12)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


def test_zero_terminal_snr_process_has_no_nan():
    process = s.make_process("linear", zero_terminal_snr=True)
    alpha, sigma = process.alpha_sigma(np.array([997.0, 998.0, 998.5, 999.0]))
    assert np.isfinite(alpha).all()
    np.testing.assert_array_equal(alpha[2:], 0)
    np.testing.assert_array_equal(sigma[2:], 1)


def test_vp_process_solves_its_sde():
    # d log alpha / dt = -beta(t) / 2, by central differences
    process, t, h = s.vp_process(), np.linspace(0.1, 0.9, 9), 1e-5
    slope = (np.log(process.alpha_sigma(t + h)[0]) - np.log(process.alpha_sigma(t - h)[0])) / (2 * h)
    np.testing.assert_allclose(slope, -0.5 * (0.1 + t * 19.9), rtol=1e-7)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: s.make_process("lineer"), "linear, cosine, scaled_linear, sigmoid, vp, subvp, ve, edm, flow"),
        (lambda: s.make_process("flow", zero_terminal_snr=True), "has none"),
        (lambda: s.DiffusionSchedule.from_betas([0.1, 1.5]), r"\(0, 1\]"),
        (lambda: s.DiffusionSchedule.from_betas([]), "non-empty"),
    ],
)
def test_mistakes_are_told(make, said):
    with pytest.raises(JaxdiffError, match=said):
        make()
