"""Likelihoods against closed forms: the density along the flow, the bound above it, and the interval of a pixel."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.mixture import MIXTURE, GaussianMixture
from scipy import stats

from jaxdiff.errors import JaxdiffError
from jaxdiff.likelihood import Bound, bits_per_dim, encode, flow_log_likelihood, log_interval, variational_bound
from jaxdiff.ode import exact_trace, hutchinson_trace
from jaxdiff.sampling import example_keys
from jaxdiff.schedules import Node, make_process, node_at
from jaxdiff.solvers import make_grid

DATA = Node(np.nan, np.array(1.0), np.array(0.0))
GAUSSIAN = GaussianMixture(np.ones(1), np.array([[0.3, -0.2]]), np.array([[[0.09, 0.02], [0.02, 0.04]]]))


def keys_for(num, seed=0):
    return example_keys(jax.random.key(seed), jnp.arange(num))


def noised(data, process, num=512):
    rng = np.random.default_rng(0)
    node = node_at(process, float(process.t_min))
    return node.alpha * data.sample(rng, num) + node.sigma * rng.standard_normal((num, 2)), node


@pytest.mark.parametrize("name", ["linear", "cosine", "vp", "subvp", "ve", "edm", "flow"])
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_bits_along_the_flow_are_the_closed_form(name, data):
    process = make_process(name)
    x, node = noised(data, process)
    found = jax.jit(lambda x: encode(data.denoiser, process, x))(x.astype(np.float32))
    assert found.converged
    assert found.latent.shape == x.shape
    bits, exact = (bits_per_dim(log_p, 2) for log_p in (found.log_density, data.log_density(x, node)))
    np.testing.assert_allclose(bits.mean(), exact.mean(), atol=1e-3)
    np.testing.assert_allclose(bits, exact, atol=0.02)  # at t_max there is something left of the mean


def test_hutchinson_s_estimate_is_unbiased_and_its_steps_may_be_fixed():
    process = make_process("vp")
    x, node = noised(MIXTURE, process, 1)
    x = np.broadcast_to(x, (2000, 2)).astype(np.float32)
    find = jax.jit(lambda x, keys: encode(MIXTURE.denoiser, process, x, keys, num_steps=40))
    found = find(x, keys_for(2000))
    assert found.num_evaluations == 241
    spread = found.log_density.std()
    assert spread > 0.01
    exact = MIXTURE.log_density(x[:1].astype(float), node)[0]
    np.testing.assert_allclose(found.log_density.mean(), exact, atol=4 * spread / np.sqrt(2000) + 1e-3)


def test_traces():
    matrix = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    f = lambda x: jnp.sin(x.reshape(-1, 6) @ matrix).reshape(x.shape)  # noqa: E731
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 3)), jnp.float32)
    jacobians = jax.vmap(jax.jacfwd(lambda x: f(x[None])[0].ravel()))(x).reshape(3, 6, 6)
    expected = jnp.trace(jacobians, axis1=1, axis2=2)
    value, found = exact_trace(f, x)
    np.testing.assert_allclose(value, f(x), rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    estimates = jax.vmap(lambda seed: hutchinson_trace(keys_for(3, seed))(f, x)[1])(jnp.arange(4000))
    np.testing.assert_allclose(estimates.mean(0), expected, atol=5 * float(estimates.std()) / np.sqrt(4000))


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("name", ["linear", "edm"])
def test_the_bound_lies_above_and_comes_down_to_the_closed_form(name, variance):
    num = 2000
    x_0 = GAUSSIAN.sample(np.random.default_rng(0), num).astype(np.float32)
    exact = -GAUSSIAN.log_density(x_0.astype(float), DATA)
    gaps = []
    for num_steps in (10, 80, 640):
        grid = make_grid(make_process(name), num_steps, "logsnr")
        bound = jax.jit(
            lambda x, keys, grid=grid: variational_bound(
                GAUSSIAN.denoiser, grid, x, keys, variance=variance, levels=None
            )
        )(x_0, keys_for(num))
        assert bound.steps.shape == (num_steps - 1, num)
        assert float(bound.prior.min()) >= 0
        gap = (bound.total - exact) / (2 * np.log(2))
        gaps.append((gap.mean(), gap.std() / np.sqrt(num)))
    for (wide, _), (narrow, error) in pairwise(gaps):
        assert -4 * error < narrow < 0.4 * wide + 4 * error
    assert gaps[0][0] > 0.1
    assert gaps[-1][0] < 0.15 + 4 * gaps[-1][1]


def test_each_of_ddpm_s_terms_is_a_divergence_of_normals():
    """Ho et al. 2020, equations 5 to 8, from betas and posteriors, for a denoiser that is wrong."""
    process = make_process("linear", 12)
    grid = make_grid(process, 12)
    x_0 = np.random.default_rng(0).uniform(-1, 1, (3, 4)).astype(np.float32)
    wrong = lambda x, node: 0.5 * x - 0.1  # noqa: E731
    seen = []

    def denoise(x, node):
        jax.debug.callback(lambda x, t: seen.append((float(t[0]), np.array(x, float))), x, node.t)
        return wrong(x, node)

    for variance in ("small", "large"):
        seen.clear()
        bound = variational_bound(denoise, grid, jnp.asarray(x_0), keys_for(3), variance=variance)
        jax.effects_barrier()
        noisy = dict(seen)
        assert len(noisy) == 12
        alphas_cumprod = grid.alpha[:-1][::-1] ** 2
        betas = 1 - alphas_cumprod / np.append(1, alphas_cumprod[:-1])
        for t in range(1, 12):
            before, at = alphas_cumprod[t - 1], alphas_cumprod[t]
            q_variance = betas[t] * (1 - before) / (1 - at)
            p_variance = q_variance if variance == "small" else betas[t]
            shift = np.sqrt(before) * betas[t] / (1 - at) * (x_0 - wrong(noisy[t], None))
            ratio = q_variance / p_variance
            expected = 0.5 * (ratio - 1 - np.log(ratio) + shift**2 / p_variance).sum(-1)
            np.testing.assert_allclose(bound.steps[11 - t], expected, rtol=1e-4)
    last = alphas_cumprod[-1]
    prior = 0.5 * ((1 - last) - 1 - np.log(1 - last) + last * x_0.astype(float) ** 2).sum(-1)
    np.testing.assert_allclose(bound.prior, prior, rtol=1e-4)


def test_a_few_terms_stand_for_all_without_bias():
    grid = make_grid(make_process("linear", 50), 50)
    x_0 = jnp.broadcast_to(jnp.asarray(MIXTURE.sample(np.random.default_rng(0), 1), jnp.float32), (6000, 2))
    bound = jax.jit(lambda keys, n: variational_bound(MIXTURE.denoiser, grid, x_0, keys, num_terms=n), static_argnums=1)
    all_terms, few = (bound(keys_for(6000), n).steps for n in (None, 5))
    assert few.shape == (5, 6000)
    error = float(np.hypot(all_terms.sum(0).std(), few.sum(0).std())) / np.sqrt(6000)
    np.testing.assert_allclose(few.sum(0).mean(), all_terms.sum(0).mean(), atol=4 * error)
    every = bound(keys_for(6000), 49).steps
    np.testing.assert_allclose(every, all_terms, rtol=1e-5)


def test_intervals_share_out_all_probability_and_keep_their_digits():
    values = np.linspace(-1, 1, 256)
    for mean, std in ((0.0, 0.1), (-1.0, 0.003), (0.99, 0.5), (0.3, 20.0)):
        found = np.asarray(log_interval(jnp.asarray(values, jnp.float32), mean, std, 256), float)
        np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-4)
        edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
        expected = np.diff(stats.norm.cdf(edges, mean, std))
        sure = expected > 1e-3
        np.testing.assert_allclose(np.exp(found)[sure], expected[sure], rtol=2e-3)
        assert np.isfinite(found).all()
    far = log_interval(jnp.array([0.5], jnp.float32), -0.5, 0.01, 256)  # 100 standard deviations off
    np.testing.assert_allclose(far, -0.5 * 99.6**2 - np.log(99.6) - 0.5 * np.log(2 * np.pi), rtol=1e-3)
    slopes = jax.grad(lambda mean: log_interval(jnp.asarray(values, jnp.float32), mean, 0.01, 256).sum())(0.1)
    assert np.isfinite(slopes)


@pytest.mark.parametrize("dequantisation", ["uniform", "gaussian"])
def test_values_of_pixels_by_the_flow_and_the_bound_above_it(dequantisation):
    """Pixels of 256 values from a Gaussian that is much wider than an interval: its density times the interval."""
    std, process = 0.25, make_process("vp")
    data = GaussianMixture(np.ones(1), np.zeros((1, 2)), std**2 * np.eye(2)[None])
    rng, num = np.random.default_rng(0), 4000
    x_0 = np.clip(np.round(data.sample(rng, num) * 127.5 + 127.5), 0, 255) / 127.5 - 1
    exact = stats.norm.logpdf(x_0, 0, std).sum(-1) + 2 * np.log(2 / 255)
    x_0 = jnp.asarray(x_0, jnp.float32)
    find = lambda x, keys: flow_log_likelihood(  # noqa: E731
        data.denoiser, process, x, keys, dequantisation=dequantisation, exact=True
    )
    flow = jax.jit(find)(x_0, keys_for(num))
    gap = bits_per_dim(flow.log_density - exact, 2)
    error = gap.std() / np.sqrt(num)
    np.testing.assert_allclose(gap.mean(), 0, atol=1e-3 + 4 * error)
    grid = make_grid(process, 100, "logsnr")
    bound = jax.jit(lambda x, keys: variational_bound(data.denoiser, grid, x, keys).total)(x_0, keys_for(num))
    above = bits_per_dim(-bound - flow.log_density, 2)
    assert above.mean() > 4 * above.std() / np.sqrt(num)


def test_what_can_not_be_is_told():
    x, keys = jnp.zeros((2, 2)), keys_for(2)
    process = make_process("vp")
    grid = make_grid(process, 10)
    for call, said in (
        (lambda: variational_bound(MIXTURE.denoiser, make_grid(process, 10, final="sigma_min"), x, keys), "clean data"),
        (lambda: variational_bound(MIXTURE.denoiser, grid, x, keys, variance="huge"), "'small' or 'large'"),
        (lambda: variational_bound(MIXTURE.denoiser, grid, x, keys, num_terms=10), "num_terms must be 1 to 9"),
        (lambda: flow_log_likelihood(MIXTURE.denoiser, process, x, keys, dequantisation="none"), "'uniform' or"),
        (lambda: encode(lambda x, node: x * jnp.nan, process, x), "the denoiser gives NaN"),
    ):
        with pytest.raises(JaxdiffError, match=said):
            call()


def test_a_bound_is_the_sum_of_its_parts():
    bound = Bound(jnp.ones(2), jnp.full((3, 2), 2.0), jnp.array([0.5, 1.5]))
    np.testing.assert_allclose(bound.total, [7.5, 8.5])
    np.testing.assert_allclose(bits_per_dim(jnp.array([-16 * np.log(2)]), 8), [2.0])
