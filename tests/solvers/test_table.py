"""The tape against algorithms run on numbers, and one compiled program for every table of a shape."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.follow import follow

from jaxdiff.errors import JaxdiffError
from jaxdiff.sampling import example_keys, initial_noise, row_noise, sample
from jaxdiff.schedules import Node, make_process
from jaxdiff.solvers import SOLVERS, Tape, ddim, lms, make_grid, make_table, pad_table, scale_noise, stack_tables

KEYS = example_keys(jax.random.key(0), jnp.arange(3))
GRID = make_grid(make_process("vp"), 12)


def denoise(x, node):
    xp = x.__array_namespace__()
    return 0.8 * xp.tanh(x + node.sigma) + 0.1 * node.alpha * xp.roll(x, 1, axis=-1)


class Eager:
    """What a tape looks like to a solver, on numbers: it computes where the tape records."""

    def __init__(self, start, noise):
        self.start, self._noise, self._row = start, noise, -1

    def denoise(self, x, node):
        self._row += 1
        return denoise(x, node)

    def noise(self):
        return self._noise(self._row)

    def keep(self, image):
        return image

    def table(self, x):
        return x


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("process", ["vp", "flow"])
def test_a_table_is_the_algorithm_that_made_it(name, process, monkeypatch):
    """Each solver's own code, run on arrays instead of a tape, gives what its table gives."""
    grid = make_grid(make_process(process), 12)
    rng = np.random.default_rng(0)
    start, noises = rng.standard_normal((2, 5)), rng.standard_normal((100, 2, 5))
    table = make_table(name, grid)
    for module in {"adams", "ancestral", "consistency", "ddim", "ddpm", "dpm", "reverse_sde", "runge_kutta", "unipc"}:
        module = sys.modules[f"jaxdiff.solvers.{module}"]  # not an attribute: ddim is the function there
        monkeypatch.setattr(module, "Tape", lambda: Eager(start, noises.__getitem__))
    monkeypatch.setattr(sys.modules["jaxdiff.solvers.runge_kutta"], "scale_noise", lambda x, s_noise: x)
    if name == "edm":
        table = scale_noise(table, 1 / 1.003)
    eager = make_table(name, grid)
    np.testing.assert_allclose(follow(table, denoise, start, noises.__getitem__), eager, rtol=1e-9, atol=1e-9)


def test_what_is_used_again_takes_an_image_and_nothing_else_does():
    images = {name: make_table(name, GRID).v.shape[1] for name in SOLVERS}
    assert images["ddim"] == images["ddpm"] == images["lcm"] == images["euler_ancestral"] == 1
    assert images["heun"] == images["dpm2"] == images["dpmpp_2m"] == 2
    assert images["dpmpp_3m"] == images["rk4"] == 3
    assert [lms(GRID, order).v.shape[1] for order in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert max(images.values()) <= 6


def test_a_combination_is_kept_as_one_image():
    tape = Tape()
    x = tape.start
    first = tape.denoise(x, GRID[0])
    mixed = 2 * x - first / 4
    tape.keep(mixed)
    second = tape.denoise(x + first, GRID[1])
    third = tape.denoise(second, GRID[2])
    table = tape.table(mixed + third + tape.noise())
    assert table.v.shape[1] == 2
    start, z = np.array([1.0, -2.0]), np.array([0.5, 0.25])
    D1 = denoise(start, GRID[0])
    D2 = denoise(start + D1, GRID[1])
    D3 = denoise(D2, GRID[2])
    np.testing.assert_allclose(follow(table, denoise, start, lambda row: z), 2 * start - D1 / 4 + D3 + z)


def test_padding_changes_nothing():
    table = make_table("dpmpp_2m_sde", GRID)
    padded = pad_table(table, 5)
    assert padded.M.shape == (12, 5, 5)
    rng = np.random.default_rng(0)
    start, noises = rng.standard_normal((2, 5)), rng.standard_normal((100, 2, 5))
    results = [follow(t, denoise, start, noises.__getitem__) for t in (table, padded)]
    np.testing.assert_array_equal(*results)
    with pytest.raises(JaxdiffError, match="2 images can not be padded to 1"):
        pad_table(table, 1)


# Each of twelve rows, and no two alike in solver, process, grid and options.
VARIETY = [
    ("ddpm", "linear", "trailing", 12, {}),
    ("ddim", "flow", "linspace", 12, {"eta": 0.3}),
    ("dpmpp_2m", "cosine", "logsnr", 12, {}),
    ("dpmpp_3m_sde", "vp", "trailing", 12, {"eta": 0.7}),
    ("unipc", "linear", "beta", 12, {"order": 3}),
    ("deis", "edm", "karras", 12, {}),
    ("plms", "linear", "leading", 11, {}),
    ("dpm_2s", "edm", "exponential", 12, {}),
    ("lms", "vp", "linspace", 12, {}),
]


def variety():
    return [
        pad_table(make_table(solver, make_grid(make_process(process), num_steps, grid), **options), 5)
        for solver, process, grid, num_steps, options in VARIETY
    ]


def test_one_program_draws_with_every_solver():
    traced = []

    @jax.jit
    def draw(table, guidance_scale):
        def guided(x, node):
            traced.append(1)
            return denoise(x, node) * guidance_scale

        return sample(guided, table, initial_noise(table, KEYS, (5,)), KEYS)

    scales = np.linspace(0.5, 2, len(VARIETY))
    drawn = [draw(table, scale) for table, scale in zip(variety(), scales, strict=True)]
    assert (len(traced), draw._cache_size()) == (1, 1)
    for table, scale, result in zip(variety(), scales, drawn, strict=True):
        start = np.asarray(initial_noise(table, KEYS, (5,)), float)
        noise = lambda row: np.asarray(row_noise(KEYS, row, (5,)), float)  # noqa: E731
        right = follow(table, lambda x, node: denoise(x, node) * scale, start, noise)  # noqa: B023
        np.testing.assert_allclose(result, right, rtol=1e-3, atol=1e-4 * np.abs(right).max())


def test_vmap_over_a_stack_gives_what_the_solvers_give_one_by_one():
    tables = variety()
    start = jax.random.normal(jax.random.key(1), (3, 5))
    together = jax.vmap(lambda table: sample(denoise, table, start, KEYS))(stack_tables(tables))
    for table, drawn in zip(tables, together, strict=True):
        alone = sample(denoise, table, start, KEYS)
        np.testing.assert_allclose(drawn, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())
    with pytest.raises(JaxdiffError, match="12, 5"):
        stack_tables([tables[0], ddim(make_grid(make_process("vp"), 5))])


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "unipc"])
def test_the_gradient_of_a_loss_by_every_entry_of_a_table_is_its_slope(name):
    """In float64, against central differences; rows without noise stay without."""
    with jax.enable_x64(True):
        keys = example_keys(jax.random.key(0), jnp.arange(3))
        table = jax.tree.map(jnp.asarray, make_table(name, make_grid(make_process("vp"), 4)))
        start = jax.random.normal(jax.random.key(1), (3, 5), jnp.float64)

        @jax.jit
        def loss(table):
            return jnp.sum(jnp.sin(sample(denoise, table, start, keys)))

        gradient = jax.grad(loss)(table)
        for field, of_field in zip(table._fields, gradient, strict=True):
            value = np.asarray(getattr(table, field))
            for index in np.ndindex(value.shape):
                if field == "n" and not table.n[index[0]].any():
                    assert of_field[index] == 0  # a row without noise draws none, and so can not tell
                    continue
                step = np.zeros_like(value)
                step[index] = 1e-5
                ends = [loss(table._replace(**{field: jnp.asarray(value + sign * step)})) for sign in (1, -1)]
                np.testing.assert_allclose(of_field[index], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "num_steps", "options", "said"),
    [
        ("dpmpp_3m", 2, {}, "Order 3 needs at least 3 steps, and the grid has 2"),
        ("unipc", 1, {}, "Order 2 needs at least 2 steps"),
        ("lms", 3, {}, "Order 4 needs at least 4 steps"),
        ("pndm", 3, {}, "pndm needs at least 4 steps"),
        ("unipc", 5, {"order": 4}, "The order of this solver is 1 to 3, not 4"),
        ("deis", 5, {"order": 0}, "The order of this solver is 1 to 4, not 0"),
        ("dpmpp_2m", 5, {"rule": "simpson"}, "midpoint, heun"),
        ("dpmpp_2m", 5, {"predict": "v"}, "'x0' or 'eps'"),
        ("dpmpp_2m_sde", 5, {"eta": 2.0}, r"eta must lie in \[0, 1\]"),
        ("unipc", 5, {"variant": "bh3"}, "bh1, bh2"),
        ("unipc", 5, {"predict": "v"}, "'x0' or 'eps'"),
        ("heun", 5, {"s_churn": -1.0}, "must not be negative"),
        ("dpmpp_sde", 5, {"r": 0.0}, r"r must lie in \(0, 1\]"),
        ("predictor_corrector", 5, {"corrections": -1}, "must not be negative"),
        ("predictor_corrector", 5, {"snr": 0.0}, "snr must be above 0"),
        ("dpm2", 5, {"eta": 1.0}, "eta is no option of the solver 'dpm2': it has s_churn, s_tmin, s_tmax"),
    ],
)
def test_what_can_not_be_is_told_in_a_sentence(name, num_steps, options, said):
    with pytest.raises(JaxdiffError, match=said):
        make_table(name, make_grid(make_process("vp"), num_steps), **options)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_zero_terminal_snr_works_or_is_told(name):
    """Where the first node has no signal at all a solver either starts from it or says that it can not."""
    process = make_process("linear", zero_terminal_snr=True)
    grid = make_grid(process, 8)
    from_it = {"ddpm", "ddpm_large", "ddim", "euler", "euler_ancestral", "lcm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"}
    from_it |= {"dpmpp_3m_sde", "ipndm", "unipc", "dpmpp_2s", "dpmpp_3s", "reverse_diffusion", "predictor_corrector"}
    in_frame = {"heun", "edm", "dpm2", "rk4", "lms", "deis", "plms", "pndm"}
    if name not in from_it:
        noise = make_grid(process, 8, frame="noise" if name in in_frame else None)
        with pytest.raises(JaxdiffError, match="zero terminal SNR"):
            make_table(name, noise)
    if name not in from_it | in_frame:
        return
    table = make_table(name, grid)
    drawn = follow(table, denoise, np.ones((2, 5)), lambda row: np.ones((2, 5)))
    assert np.isfinite(drawn).all()


def test_every_solver_has_a_line_and_options_by_name():
    assert all(10 < len(solver.about) < 100 for solver in SOLVERS.values())
    assert SOLVERS["ddim"].options == ("eta",)
    assert SOLVERS["edm"].options == ("s_churn", "s_tmin", "s_tmax", "s_noise")
    assert SOLVERS["predictor_corrector"].options == ("corrections", "snr")
    assert SOLVERS["rk4"].options == ()


def test_the_scan_of_no_rows_of_noise_draws_none():
    """A deterministic table does not depend on the keys."""
    table = make_table("dpmpp_2m", GRID)
    start = jax.random.normal(jax.random.key(1), (3, 5))
    other = example_keys(jax.random.key(9), jnp.arange(3))
    np.testing.assert_array_equal(sample(denoise, table, start, KEYS), sample(denoise, table, start, other))
    assert isinstance(table.node, Node)
