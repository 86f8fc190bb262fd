"""Grids: against diffusers' and k-diffusion's, by their formulas, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import DiffusionSchedule, discrete_process, flow_process, make_process, node_at
from jaxdiff.schedules import scaled_linear_beta_schedule as scaled_linear
from jaxdiff.solvers import GRIDS, ddim, ddpm, describe_grids, grid_at, invert, make_grid, make_table, tail

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCHEDULES = np.load(FIXTURES / "schedules.npz")
SOLVERS = np.load(FIXTURES / "solvers.npz")
SD = discrete_process(DiffusionSchedule.from_betas(scaled_linear(1000)))
ALIGNED = ("ays_sd", "ays_sdxl", "ays_svd")


def levels(grid):
    return grid.sigma / grid.alpha


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 10, 50, 1000])
def test_times_equal_diffusers(spacing, steps):
    grid = make_grid(make_process("linear"), steps, spacing)
    np.testing.assert_array_equal(grid.t[:-1], SCHEDULES[f"timesteps/{spacing}_{steps}"])


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_noise_levels_equal_diffusers(name):
    """Between rows diffusers takes a time at which log sigma is linear, and here log alpha_bar is."""
    grid = make_grid(SD, 10, name)
    np.testing.assert_allclose(levels(grid), SOLVERS[f"euler_{name}_n10/sigmas"], rtol=1e-9)
    np.testing.assert_allclose(grid.t[:-1], SOLVERS[f"euler_{name}_n10/timesteps"], atol=0.15)


def test_log_snr_equals_diffusers_lu_lambdas():
    np.testing.assert_allclose(levels(make_grid(SD, 10, "logsnr")), SOLVERS["dpm++_2m_lu_n10/sigmas"], rtol=1e-9)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_edm_s_levels_equal_diffusers(name):
    reference = "edm_euler_n10" if name == "karras" else "edm_euler_exponential_n10"
    np.testing.assert_allclose(
        make_grid(make_process("edm"), 10, name).sigma, SOLVERS[f"{reference}/sigmas"], rtol=1e-9
    )


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_flow_times_equal_diffusers(name):
    process = flow_process(t_min=1e-3, t_max=1.0 - 1e-12)  # diffusers begins at 1
    expected = SOLVERS[f"flow_euler_{name}_n10/sigmas"]
    np.testing.assert_allclose(make_grid(process, 10, name).t, expected, atol=1e-9)


def test_flow_shift_equals_diffusers():
    process = flow_process(t_min=0.1, t_max=1.0)
    expected = SOLVERS["flow_euler_given_shift3_n10/sigmas"]
    np.testing.assert_allclose(make_grid(process, 10, "linspace", shift=3.0).t, expected, atol=1e-12)


def test_sigma_min_is_the_last_node_where_asked_for():
    grid = make_grid(SD, 10, "trailing", final="sigma_min")
    np.testing.assert_allclose(levels(grid)[:-1], levels(make_grid(SD, 10))[:-1])
    assert grid.t[-1] == 0
    assert levels(grid)[-1] == pytest.approx(0.0292, abs=1e-4)
    for name in ("leading", "linspace", "karras"):  # these end there of themselves: still ten steps
        grid = make_grid(SD, 10, name, final="sigma_min")
        assert (grid.num_steps, grid.t[-1]) == (10, pytest.approx(0, abs=1e-6))
        assert np.all(np.diff(levels(grid)) < 0)


@pytest.mark.parametrize("spacing", [name for name in GRIDS if name not in ALIGNED])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp", "edm", "flow"])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_grids_go_down_and_end_clean(spacing, schedule, steps):
    process = make_process(schedule)
    grid = make_grid(process, steps, spacing)
    assert all(len(field) == steps + 1 for field in (grid.t, grid.alpha, grid.sigma))
    assert np.all(np.diff(grid.t) < 0)
    assert np.all(np.diff(levels(grid)) < 0)
    assert (grid.alpha[-1], grid.sigma[-1]) == (1, 0)
    inner = node_at(process, grid.t[:-1])
    np.testing.assert_allclose(inner.alpha, grid.alpha[:-1])


def test_karras_grid_is_equation_5():
    grid = make_grid(make_process("edm"), 18, "karras")
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grid.sigma[:-1], expected, rtol=1e-9)


def test_aligned_steps_are_the_tables_and_log_linear_between_them():
    grid = make_grid(SD, 10, "ays_sd")
    # Sabour et al. publish timesteps for ten steps of Stable Diffusion 1.5 as well as noise levels.
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    np.testing.assert_allclose(grid.t[:-1], published, atol=1.0)
    twenty = levels(make_grid(SD, 20, "ays_sd"))[:-1]
    np.testing.assert_allclose(twenty[::2], levels(grid)[:-1], rtol=1e-9)
    np.testing.assert_allclose(twenty[1], np.sqrt(twenty[0] * twenty[2]), rtol=1e-4)
    assert make_grid(make_process("vp"), 5, "ays_sdxl").num_steps == 5
    with pytest.raises(JaxdiffError, match="more than this process has"):
        make_grid(SD, 10, "ays_svd")
    video = make_grid(make_process("edm")._replace(t_max=700.0), 10, "ays_svd")
    np.testing.assert_allclose(video.sigma[[0, 1]], [700, 54.5], rtol=1e-9)


def test_a_process_s_frame_is_that_of_flows_where_it_begins_at_high_noise():
    frames = {name: make_process(name).frame for name in ("linear", "scaled_linear", "cosine", "vp", "edm", "flow")}
    assert {name for name, frame in frames.items() if frame == "flow"} == {"cosine", "flow"}
    assert make_process("linear", zero_terminal_snr=True).frame == "flow"
    first = make_grid(make_process("cosine", zero_terminal_snr=True), 5, "karras")[0]
    assert (first.t, first.level) == (999, 1)


def test_times_of_one_s_own():
    grid = grid_at(SD, [999, 500.5, 20])
    np.testing.assert_array_equal(grid.t, [999, 500.5, 20, -1])
    assert grid_at(SD, [999, 20], final="sigma_min").num_steps == 1


def test_the_tail_of_a_grid():
    grid = make_grid(SD, 10)
    assert tail(grid, 1.0).num_steps == 10
    np.testing.assert_array_equal(tail(grid, 0.3).t, grid.t[-4:])
    for strength in (0.0, -1, 1.01, 0.01):
        with pytest.raises(JaxdiffError, match=r"strength must lie in \(0, 1\]"):
            tail(grid, strength)


def test_points_between_nodes_are_on_the_process():
    for name in ("linear", "vp", "edm", "flow"):
        grid = make_grid(make_process(name), 4)
        for i in range(3):
            s, t = grid[i], grid[i + 1]
            mid = grid.at((s.lam + t.lam) / 2)
            assert mid.lam == pytest.approx((s.lam + t.lam) / 2, abs=1e-9)
            assert grid.at_level((s.level + t.level) / 2).level == pytest.approx((s.level + t.level) / 2, rel=1e-9)
            assert t.t < mid.t < s.t
    assert make_grid(make_process("flow"), 4)[0].scale == 1


def test_each_grid_has_a_line():
    assert set(describe_grids()) == set(GRIDS)
    assert all(20 < len(line) < 140 for line in describe_grids().values())


LINEAR = make_process("linear")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: make_grid(LINEAR, 0), "between 1 and the process's 1000"),
        (lambda: make_grid(LINEAR, 1001), "1001 is not"),
        (lambda: make_grid(LINEAR, 1000, "linspace", final="sigma_min"), "only 1000 times"),
        (lambda: make_grid(make_process("flow"), -1), "at least 1"),
        (lambda: make_grid(make_process("flow"), 5, "middle"), "trailing, leading, linspace, karras"),
        (lambda: make_grid(make_process("cosine", zero_terminal_snr=True), 5, "logsnr"), "zero terminal SNR"),
        (lambda: make_grid(make_process("cosine", zero_terminal_snr=True), 5, "karras", frame="noise"), "'flow'"),
        (lambda: make_grid(LINEAR, 5, final="last"), "'zero' or 'sigma_min'"),
        (lambda: make_grid(LINEAR, 5, shift=3.0), "flow process alone"),
        (lambda: make_grid(LINEAR, 5, shift=3.0, frame="flow"), "flow process alone"),
        (lambda: make_grid(LINEAR, 5, frame="edm"), "noise, flow"),
        (lambda: make_grid(make_process("flow"), 5, shift=-1.0), "above 0"),
        (lambda: grid_at(LINEAR, [10, 20]), "must fall from noise to data"),
        (lambda: grid_at(LINEAR, [1000.0]), "go from 0 to 999"),
        (lambda: grid_at(LINEAR, []), "a list of numbers"),
        (lambda: grid_at(LINEAR, [np.nan]), "a list of numbers"),
        (lambda: grid_at(make_process("edm"), [2.0, -1.0]), "must fall from noise to data"),
        (lambda: grid_at(make_process("flow"), [1.5, 0.5]), "must fall from noise to data"),
        (lambda: grid_at(LINEAR, [5], final="sigma_min"), "at least two nodes"),
        (lambda: invert(make_grid(LINEAR, 5)), "final='sigma_min'"),
        (lambda: make_table("eulerr", make_grid(LINEAR, 5)), "ddpm, ddpm_large, ddim, euler,"),
        (
            lambda: make_table("ddpm", make_grid(LINEAR, 5), eta=0.5),
            "eta is no option of the solver 'ddpm': it has v",
        ),
        (lambda: make_table("rk4", make_grid(LINEAR, 5), order=3), "it has none"),
        (lambda: ddim(make_grid(LINEAR, 5), eta=1.5), r"\[0, 1\]"),
        (lambda: ddpm(make_grid(LINEAR, 5), "middling"), "'small' or 'large'"),
    ],
)
def test_mistakes_are_told(make, said):
    with pytest.raises(JaxdiffError, match=said):
        make()
