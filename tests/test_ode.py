"""The adaptive ODE against closed forms and SciPy, its cost and its failures; and the mixture it is tried on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.mixture import MIXTURE, GaussianMixture
from scipy.integrate import solve_ivp

from jaxdiff.errors import JaxdiffError
from jaxdiff.ode import solve_ode
from jaxdiff.schedules import Node, make_process, node_at

PROCESSES = {name: make_process(name) for name in ("linear", "vp", "edm", "flow")}
FLOW = PROCESSES["flow"]
GAUSSIAN = GaussianMixture(np.ones(1), np.array([[0.5, -0.3]]), np.array([[[1.2, 0.0], [0.0, 0.04]]]))


def noised(process, t, num=4):
    """Exact x_t [num, 2] of the mixture, float64."""
    rng = np.random.default_rng(0)
    node = node_at(process, np.array(t, float))
    return node.alpha * MIXTURE.sample(rng, num) + node.sigma * rng.standard_normal((num, 2))


def nan_denoiser(x, node):
    return x * jnp.nan


@pytest.mark.parametrize("name", [*PROCESSES, "zero terminal SNR"])
def test_a_gaussian_has_a_closed_form_in_both_directions(name):
    """Along the ODE (x - alpha mean) / std(x_t) stays as it is."""
    process = PROCESSES[name] if name in PROCESSES else make_process("linear", zero_terminal_snr=True)
    x = noised(process, process.t_max).astype(np.float32)
    whitened, states = [], []
    for t_start, t_end in ((process.t_max, process.t_min), (process.t_min, process.t_max)):
        solution = jax.jit(lambda x, s=t_start, e=t_end: solve_ode(GAUSSIAN.denoiser, process, x, s, e))(x)
        assert solution.converged
        assert solution.x.dtype == jnp.float32
        states += [x, solution.x]
        for t, state in zip((t_start, t_end), states[-2:], strict=True):
            alpha, sigma = process.alpha_sigma(np.array(t, float))
            std = np.sqrt(alpha**2 * np.diag(GAUSSIAN.covariance()) + sigma**2)
            whitened.append((state - alpha * GAUSSIAN.mean()) / std)
        x = solution.x
    for w in whitened[1:]:
        np.testing.assert_allclose(w, whitened[0], atol=3e-4)
    np.testing.assert_allclose(states[-1], states[0], rtol=3e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_mixture_agrees_with_scipy_and_comes_back(name):
    """SciPy solves it as Karras et al. 2022 write it: y = x / alpha, dy / d log(sigma / alpha) = y - D."""
    process = PROCESSES[name]
    x = noised(process, process.t_max)
    (a, s), (a_end, s_end) = (process.alpha_sigma(np.array(t, float)) for t in (process.t_max, process.t_min))

    def derivative(log_level, y):
        y = y.reshape(-1, 2)
        return (y - MIXTURE.denoiser(y, Node(np.nan, np.array(1.0), np.exp(log_level)))).ravel()

    span = np.log([s / a, s_end / a_end])
    expected = a_end * solve_ivp(derivative, span, (x / a).ravel(), "DOP853", rtol=1e-12, atol=1e-12).y[:, -1]

    @jax.jit
    def there_and_back(x):
        there = solve_ode(MIXTURE.denoiser, process, x, process.t_max, process.t_min, rtol=1e-10, atol=1e-10)
        back = solve_ode(MIXTURE.denoiser, process, there.x, process.t_min, process.t_max, rtol=1e-10, atol=1e-10)
        return there, back

    with jax.enable_x64(True):
        there, back = jax.tree.map(np.asarray, there_and_back(x))
    assert there.x.dtype == np.float64
    np.testing.assert_allclose(there.x.ravel(), expected, atol=1e-8)
    np.testing.assert_allclose(back.x, x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PROCESSES)
def test_evaluations_are_counted_and_nodes_are_the_process_s(name):
    process, seen = PROCESSES[name], []

    def denoise(x, node):
        jax.debug.callback(lambda *node: seen.append(np.array(node, float)), *node)
        return MIXTURE.denoiser(x, node)

    x = noised(process, process.t_max).astype(np.float32)
    solution = jax.jit(lambda x: solve_ode(denoise, process, x, process.t_max, process.t_min))(x)
    jax.effects_barrier()
    assert solution.num_evaluations == len(seen) < 130
    t, alpha, sigma = np.array(seen).T
    np.testing.assert_allclose([t.min(), t.max()], [process.t_min, process.t_max], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose([alpha, sigma], process.alpha_sigma(t), rtol=1e-3)  # t near the ends has few digits


def test_the_tolerance_is_what_it_costs_and_what_it_gives():
    x = noised(FLOW, FLOW.t_max, 16)
    solve = lambda x, tol: solve_ode(MIXTURE.denoiser, FLOW, x, FLOW.t_max, FLOW.t_min, rtol=tol, atol=tol)  # noqa: E731
    with jax.enable_x64(True):
        exact, *others = (jax.tree.map(np.asarray, jax.jit(solve)(x, tol)) for tol in (1e-10, 1e-7, 1e-5, 1e-3))
    for tol, solution in zip((1e-7, 1e-5, 1e-3), others, strict=True):
        assert np.abs(solution.x - exact.x).max() < 5 * tol
    assert 300 > others[0].num_evaluations > 2 * others[2].num_evaluations


def test_no_example_hides_in_its_batch():
    """Beside 63 that stand still, the first is solved in the steps that it needs alone."""
    denoise = lambda x, node: MIXTURE.denoiser(x, node) * (jnp.arange(len(x)) == 0)[:, None]  # noqa: E731
    x = jnp.zeros((64, 2)).at[0].set(jnp.array([0.3, -0.2]))
    together, alone = (jax.jit(lambda x: solve_ode(denoise, FLOW, x, 0.999, 0.001))(x) for x in (x, x[:1]))
    assert together.num_evaluations == alone.num_evaluations
    np.testing.assert_allclose(together.x[:1], alone.x, atol=1e-5)


def test_gradients_match_finite_differences():
    """In x and in what the denoiser closes over."""
    weights = np.random.default_rng(1).standard_normal((4, 2))

    @jax.jit
    def loss(x, scale):
        denoise = lambda x, node: scale * MIXTURE.denoiser(x, node)  # noqa: E731
        return (weights * solve_ode(denoise, FLOW, x, 0.9, 0.01, rtol=1e-9, atol=1e-9, max_steps=256).x).sum()

    x, direction = noised(FLOW, 0.9), np.random.default_rng(2).standard_normal((4, 2))
    with jax.enable_x64(True):
        of_x, of_scale = jax.jit(jax.grad(loss, (0, 1)))(x, 1.0)
        difference = (loss(x + 1e-4 * direction, 1.0) - loss(x - 1e-4 * direction, 1.0)) / 2e-4
        np.testing.assert_allclose((of_x * direction).sum(), difference, rtol=1e-5)
        np.testing.assert_allclose(of_scale, (loss(x, 1.0 + 1e-4) - loss(x, 1.0 - 1e-4)) / 2e-4, rtol=1e-5)


def test_times_may_be_traced():
    x = noised(FLOW, 0.9).astype(np.float32)
    solve = jax.jit(lambda t_start, t_end: solve_ode(MIXTURE.denoiser, FLOW, x, t_start, t_end))
    expected = jax.jit(lambda x: solve_ode(MIXTURE.denoiser, FLOW, x, 0.9, 0.1))(x)
    np.testing.assert_allclose(solve(0.9, 0.1).x, expected.x, atol=1e-5)
    np.testing.assert_allclose(solve(0.9, 0.9).x, x, rtol=1e-6)
    for t_start, t_end in ((0.9, 0.0), (0.0, 0.9), (0.9, -1.0), (1.5, 0.9)):
        solution = solve(t_start, t_end)
        assert not solution.converged
        assert jnp.isnan(solution.x).all()
        assert solution.num_evaluations < 100


def test_too_few_steps_are_told():
    x = noised(FLOW, 0.999).astype(np.float32)
    with pytest.raises(JaxdiffError, match=r"from t = 0.999 to 0.001 needs more than max_steps=3: allow more"):
        solve_ode(MIXTURE.denoiser, FLOW, x, 0.999, 0.001, max_steps=3)
    solution = jax.jit(lambda x: solve_ode(MIXTURE.denoiser, FLOW, x, 0.999, 0.001, max_steps=3))(x)
    assert not solution.converged
    assert jnp.isnan(solution.x).all()
    assert solution.num_evaluations == 19


def test_a_nan_is_told_and_soon():
    x = noised(FLOW, 0.999).astype(np.float32)
    with pytest.raises(JaxdiffError, match="the denoiser gives NaN"):
        solve_ode(nan_denoiser, FLOW, x, 0.999, 0.001)
    solution = jax.jit(lambda x: solve_ode(nan_denoiser, FLOW, x, 0.999, 0.001))(x)
    assert not solution.converged
    assert solution.num_evaluations < 100


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("linear", 1000),
        ("linear", -1),
        ("vp", 0),
        ("vp", -0.1),
        ("edm", 0.0),
        ("edm", np.nan),
        ("flow", 0),
        ("flow", 2),
    ],
)
def test_times_without_noise_or_rows_are_refused(name, t):
    process, x = PROCESSES[name], jnp.zeros((2, 2))
    for ends in ((t, process.t_max), (process.t_max, t)):
        with pytest.raises(JaxdiffError, match=f"no end at t = .*: choose times from {process.t_min} to "):
            solve_ode(MIXTURE.denoiser, process, x, *ends)


def test_a_time_for_each_example_is_refused():
    with pytest.raises(JaxdiffError, match=r"one time for the whole batch, not at times of shape \(2,\)"):
        solve_ode(MIXTURE.denoiser, FLOW, jnp.zeros((2, 2)), np.array([0.8, 0.9]), 0.1)


# --- the mixture itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.02), (0.9, 0.3), (0.3, 0.95), (1.0, 80.0), (0.0, 1.0)])
def test_the_mixture_s_denoiser_follows_from_its_density(alpha, sigma):
    """Tweedie: alpha E[x_0 | x_t] = x_t + sigma^2 grad log p(x_t); far from all data too, where densities underflow."""
    node = Node(np.nan, np.array(alpha), np.array(sigma))
    rng = np.random.default_rng(0)
    x = np.concatenate([alpha * MIXTURE.sample(rng, 50) + sigma * rng.standard_normal((50, 2)), [[30.0, -40.0]]])
    h = 1e-5 * max(sigma, 0.1)
    steps = h * np.eye(2)
    gradient = [(MIXTURE.log_density(x + e, node) - MIXTURE.log_density(x - e, node)) / (2 * h) for e in steps]
    denoised = MIXTURE.denoiser(x, node)
    np.testing.assert_allclose(alpha * denoised, x + sigma**2 * np.stack(gradient, -1), rtol=1e-6, atol=1e-6)
    if alpha == 0:
        np.testing.assert_allclose(denoised, np.broadcast_to(MIXTURE.mean(), x.shape))
    per_example = Node(np.nan, np.full(len(x), alpha), np.full(len(x), sigma))
    np.testing.assert_array_equal(MIXTURE.denoiser(x, per_example), denoised)
    in_jax = jax.jit(lambda x: MIXTURE.denoiser(x, node))(jnp.asarray(x, jnp.float32))
    assert in_jax.dtype == jnp.float32
    np.testing.assert_allclose(in_jax[:-1], denoised[:-1], atol=1e-3)


def test_the_mixture_s_density_mean_and_covariance_are_those_of_its_samples():
    axis = np.linspace(-2.5, 2.5, 401)
    x = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for alpha, sigma in ((1.0, 0.0), (0.8, 0.2)):
        p = np.exp(MIXTURE.log_density(x, Node(np.nan, np.array(alpha), np.array(sigma)))) * (axis[1] - axis[0]) ** 2
        mean = p @ x
        np.testing.assert_allclose(p.sum(), 1, atol=1e-8)
        np.testing.assert_allclose(mean, alpha * MIXTURE.mean(), atol=1e-8)
        covariance = alpha**2 * MIXTURE.covariance() + sigma**2 * np.eye(2)
        np.testing.assert_allclose((p[:, None] * (x - mean)).T @ (x - mean), covariance, atol=1e-8)
    drawn = MIXTURE.sample(np.random.default_rng(0), 100_000)
    np.testing.assert_allclose(drawn.mean(0), MIXTURE.mean(), atol=0.01)
    np.testing.assert_allclose(np.cov(drawn.T), MIXTURE.covariance(), atol=0.01)
    assert np.mean(np.abs(drawn).max(1) < 1) > 0.98
