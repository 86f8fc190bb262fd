"""Solvers on data whose exact denoiser is known: orders of convergence, moments, and the way back to the noise."""

from functools import partial

import numpy as np
import pytest
from fixtures.follow import follow
from fixtures.mixture import MIXTURE
from scipy.integrate import solve_ivp

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import Node, Process, make_process, node_at
from jaxdiff.solvers import Grid, dpm2, grid_at, heun, invert, lcm, make_grid, make_table, rk4

EDM = make_process("edm")
RNG = np.random.default_rng(0)


def grid_over(process: Process, levels: np.ndarray) -> Grid:
    """A grid at levels, the last of which is where it ends."""
    times = process.time_at(2 * np.log((1 - levels) / levels if process.frame == "flow" else 1 / levels))
    return grid_at(process, times, final="sigma_min")


def exact(grid: Grid, x: np.ndarray) -> np.ndarray:
    """The mixture's probability flow from the first to the last node of a grid: dy / d log level = y - D."""
    s, t = grid[0], grid[grid.num_steps]

    def flow(log_level, y):
        node = grid.at_level(np.exp(log_level))
        x = node.scale * y.reshape(-1, 2)
        return (x / node.scale - MIXTURE.denoiser(x, Node(*map(np.float64, node[:3])))).ravel()

    ends = (np.log(s.level), np.log(t.level))
    solved = solve_ivp(flow, ends, (x / s.scale).ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    return t.scale * solved.y[:, -1].reshape(x.shape)


def noisy(grid: Grid, num: int = 16) -> np.ndarray:
    """Samples of the mixture at a grid's first node."""
    rng = np.random.default_rng(3)
    return grid[0].alpha * MIXTURE.sample(rng, num) + grid[0].sigma * rng.standard_normal((num, 2))


def slope(make, process, levels, num_steps: int) -> float:
    """The order at which the error falls from num_steps to twice as many."""
    start = noisy(grid_over(process, levels(4)))
    right = exact(grid_over(process, levels(4)), start)
    errors = [
        np.linalg.norm(follow(make(grid_over(process, levels(n))), MIXTURE.denoiser, start) - right)
        for n in (num_steps, 2 * num_steps)
    ]
    return np.log2(errors[0] / errors[1])


def geometric(num_steps):
    return np.geomspace(80, 0.05, num_steps + 1)


def even(num_steps):
    return np.linspace(1.5, 0.3, num_steps + 1)


FULL = {"lower_order_final": False}
ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpm2", {}, 2),
    ("rk4", {}, 4),
    *((name, {"order": order, **FULL}, order) for name in ("dpm_2m", "dpmpp_2m") for order in (1, 2, 3)),
    *((name, {"rule": "heun", **FULL}, 2) for name in ("dpm_2m", "dpmpp_2m")),
    ("dpmpp_3m", FULL, 3),
    *((name, {"order": order}, order) for name in ("dpm_2s", "dpmpp_2s") for order in (1, 2, 3)),
    *((name, {"order": order, "rule": "heun"}, order) for name in ("dpm_2s", "dpmpp_2s") for order in (2, 3)),
    ("dpmpp_3s", {}, 3),
    *(("unipc", {"order": p, "corrector": False, **FULL}, p) for p in (1, 2, 3)),
    *(("unipc", {"order": p, "variant": way, **FULL}, p + 1) for p in (1, 2, 3) for way in ("bh1", "bh2")),
    *(("unipc", {"order": p, "predict": "eps", **FULL}, p + 1) for p in (1, 2)),
    *(("deis", {"order": order, **FULL}, order) for order in (1, 2, 3)),
    *(("lms", {"order": order}, order) for order in (1, 2, 3, 4)),
]


@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=lambda value: str(value).replace(" ", ""))
def test_the_order_is_the_nominal_one(name, options, order):
    num_steps = 384 if order == 4 or name == "dpmpp_3m" or options.get("order") == 3 else 96
    assert abs(slope(lambda grid: make_table(name, grid, **options), EDM, geometric, num_steps) - order) < 0.3


def test_deis_of_order_4():
    """Its first steps, of lower order, soon limit it; where noise is nearly all there is, they cost least."""
    far = lambda n: np.geomspace(2000, 0.05, n + 1)  # noqa: E731
    assert slope(lambda grid: make_table("deis", grid, order=4, **FULL), EDM, far, 384) > 3.7


@pytest.mark.parametrize("name", ["pndm", "plms", "ipndm"])
def test_equal_weights_are_of_order_4_on_equal_steps_and_of_order_2_on_others(name):
    """But for iPNDM, which starts with a step of Euler's."""
    make = partial(make_table, name)
    steps, order = (320, 2) if name == "ipndm" else (80, 4)
    assert abs(slope(make, EDM, even, steps) - order) < 0.3
    assert abs(slope(make, EDM, geometric, 192) - 2) < 0.3


@pytest.mark.parametrize("make", [heun, dpm2, rk4])
@pytest.mark.parametrize("frame", ["noise", "flow"])
@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
def test_runge_kutta_in_either_frame_of_each_process(process, frame, make):
    levels = lambda n: np.geomspace(0.95 if frame == "flow" else 20, 0.05, n + 1)  # noqa: E731
    in_frame = make_process(process)._replace(frame=frame)
    assert abs(slope(make, in_frame, levels, 96) - (4 if make is rk4 else 2)) < 0.3


@pytest.mark.parametrize("name", ["heun", "rk4"])
def test_the_frame_of_flows_is_the_better_one_from_high_noise_on(name):
    """The cosine schedule begins at a noise level of 20,000, which slopes over noise levels are multiplied with."""
    process = make_process("cosine")
    grids = [make_grid(process, 20, "linspace", final="sigma_min", frame=frame) for frame in ("noise", "flow")]
    start = RNG.standard_normal((16, 2))
    right = exact(grids[1], start)
    in_noise, in_flow = (np.abs(follow(make_table(name, g), MIXTURE.denoiser, start) - right).max() for g in grids)
    assert in_flow < 0.2
    assert in_flow < in_noise / 2


STOCHASTIC = [
    ("ddpm", {}),
    ("ddpm_large", {}),
    ("ddim", {"eta": 0.5}),
    ("euler", {"s_churn": 10.0}),
    ("euler_ancestral", {}),
    ("edm", {"s_noise": 1.0}),
    ("dpm2", {"s_churn": 10.0}),
    ("dpm2_ancestral", {}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.5, "r": 0.4}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.5, "rule": "heun"}),
    ("dpmpp_3m_sde", {}),
    ("dpm_2m", {"eta": 1.0}),
    ("dpmpp_2s", {"eta": 1.0}),
    ("euler_maruyama", {}),
    ("reverse_diffusion", {}),
    ("predictor_corrector", {"corrections": 1, "snr": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), STOCHASTIC, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("process", ["edm", "vp", "flow"])
def test_stochastic_solvers_keep_mean_and_covariance(name, options, process):
    slow = name.startswith(("ddpm", "ddim", "euler", "dpmpp_2s", "reverse", "predictor"))
    grid = make_grid(make_process(process), 200 if slow else 60, "logsnr")
    table = make_table(name, grid, **options)
    num = 4000
    start = np.hypot(table.alpha[0], table.sigma[0]) * RNG.standard_normal((num, 2))
    drawn = follow(table, MIXTURE.denoiser, start, lambda row: RNG.standard_normal((num, 2)))
    spread = np.sqrt(np.diag(MIXTURE.covariance()))
    np.testing.assert_allclose(drawn.mean(0), MIXTURE.mean(), atol=4.5 * spread.max() / np.sqrt(num))
    np.testing.assert_allclose(np.cov(drawn.T), MIXTURE.covariance(), atol=0.03)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_maruyama", "reverse_diffusion", "predictor_corrector"])
def test_the_ode_and_the_reverse_sde_recover_the_mixture_s_weights(name):
    num = 2500
    table = make_table(name, make_grid(make_process("vp"), 200, "logsnr"))
    start = RNG.standard_normal((num, 2))
    drawn = follow(table, MIXTURE.denoiser, start, lambda row: RNG.standard_normal((num, 2)))
    data = Node(np.nan, np.array(1.0), np.array(0.0))
    log_joint, _ = MIXTURE._components(drawn, data)
    shares = np.bincount(log_joint.argmax(1), minlength=3) / num
    np.testing.assert_allclose(shares, MIXTURE.weights, atol=0.04)  # four standard errors


def test_langevin_s_steps_alone_keep_the_density_of_their_noise_level():
    """Corrections without end at one level: x_t stays of the covariance alpha^2 C + sigma^2 I."""
    grid = grid_at(make_process("vp"), [0.31, 0.3])
    table = make_table("predictor_corrector", grid, corrections=150, snr=0.1)
    node = node_at(make_process("vp"), 0.31)
    start = node.alpha * MIXTURE.sample(RNG, 4000) + node.sigma * RNG.standard_normal((4000, 2))
    shortened = table._replace(**{name: getattr(table, name)[:-1] for name in ("t", "alpha", "sigma", "M", "v", "n")})
    drawn = follow(shortened, MIXTURE.denoiser, start, lambda row: RNG.standard_normal((4000, 2)))
    alpha, sigma = grid[1].alpha, grid[1].sigma
    np.testing.assert_allclose(np.cov(drawn.T), alpha**2 * MIXTURE.covariance() + sigma**2 * np.eye(2), atol=0.05)
    assert np.abs(np.corrcoef(drawn[:, 0], start[:, 0])[0, 1]) < 0.2  # they have moved


def test_consistency_sampling_keeps_a_gaussian():
    """With a Gaussian's exact consistency function, which leads along its flow to clean data."""
    std, mean = 0.5, 0.2

    def consistency(x, node):
        return mean + std / np.sqrt((node.alpha * std) ** 2 + node.sigma**2) * (x - node.alpha * mean)

    table = lcm(make_grid(make_process("vp"), 4))
    drawn = follow(table, consistency, RNG.standard_normal((20_000, 1)), lambda row: RNG.standard_normal((20_000, 1)))
    np.testing.assert_allclose([drawn.mean(), drawn.std()], [mean, std], atol=0.02)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "unipc", "lms", "rk4"])
@pytest.mark.parametrize("process", ["linear", "edm", "flow"])
def test_there_and_back(name, process):
    """From images to their noise on the inverted grid, and back: the error is that of the solver's own steps."""
    grid = make_grid(make_process(process), 200, "logsnr", final="sigma_min")
    up = make_table(name, invert(grid))
    images = up.alpha[0] * MIXTURE.sample(np.random.default_rng(0), 16)
    noise = follow(up, MIXTURE.denoiser, images)
    first = grid[0]
    assert 0.4 < noise.std() / np.hypot(first.alpha * 0.6, first.sigma) < 1.6
    back = follow(make_table(name, grid), MIXTURE.denoiser, noise)
    np.testing.assert_allclose(back, images, atol=0.15 if name == "ddim" else 0.02)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpm", {}), ("ddim", {"eta": 1.0}), ("euler_ancestral", {}), ("edm", {}), ("dpm2_ancestral", {}), ("lcm", {}),
        ("dpmpp_2s_ancestral", {}), ("dpmpp_sde", {}), ("dpmpp_2m_sde", {}), ("dpmpp_2s", {"eta": 1.0}),
        ("euler_maruyama", {}), ("reverse_diffusion", {}), ("predictor_corrector", {}),
    ],
)  # fmt: skip
def test_a_stochastic_solver_can_not_invert(name, options):
    up = invert(make_grid(make_process("linear"), 10, final="sigma_min"))
    with pytest.raises(JaxdiffError, match="only a deterministic solver can go from an image to its noise"):
        make_table(name, up, **options)
