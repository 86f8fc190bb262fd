"""The table of predictions: the rows of the papers, and that every row gives x_0 back."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.preconditioning import PREDICTIONS, make_denoiser, precondition
from jaxdiff.schedules import make_process, node_at

ALPHA, SIGMA, DATA = 0.8, 0.5, 0.5
ROWS = {  # c_skip and c_out as in the design's table
    "eps": (1 / ALPHA, -SIGMA / ALPHA),
    "x0": (0, 1),
    "v": (ALPHA / (ALPHA**2 + SIGMA**2), -SIGMA / (ALPHA**2 + SIGMA**2)),
    "flow": (1 / (ALPHA + SIGMA), -SIGMA / (ALPHA + SIGMA)),
    "score": (1 / ALPHA, SIGMA**2 / ALPHA),
}
TARGETS = {
    "eps": lambda x0, eps: eps,
    "x0": lambda x0, eps: x0,
    "v": lambda x0, eps: ALPHA * eps - SIGMA * x0,
    "flow": lambda x0, eps: eps - x0,
    "score": lambda x0, eps: -eps / SIGMA,
}


@pytest.mark.parametrize("prediction", ROWS)
def test_rows_are_the_papers(prediction):
    p = precondition(prediction, jnp.float32(ALPHA), jnp.float32(SIGMA))
    np.testing.assert_allclose([p.c_skip, p.c_out], ROWS[prediction], rtol=1e-6)
    assert p.c_in == 1
    np.testing.assert_allclose(p.a * 0.3 + p.b * -1.2, TARGETS[prediction](0.3, -1.2), rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 30.0])
def test_edm_is_karras_table_1(sigma):
    p = precondition("edm", jnp.float32(1), jnp.float32(sigma), DATA)
    norm = (sigma**2 + DATA**2) ** 0.5
    np.testing.assert_allclose(
        [p.c_in, p.c_skip, p.c_out], [1 / norm, DATA**2 / norm**2, sigma * DATA / norm], rtol=1e-5
    )
    # a network that gets unit variance in is asked for unit variance, whatever the noise level
    np.testing.assert_allclose((p.a * DATA) ** 2 + p.b**2, 1, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp", "edm", "flow"])
def test_a_perfect_network_gives_x_0_back(prediction, schedule):
    process = make_process(schedule)
    node = node_at(process, jnp.linspace(process.t_min, process.t_max, 9))
    rng = np.random.default_rng(0)
    x_0, eps = (jnp.asarray(rng.normal(size=(9, 3)), jnp.float32) for _ in range(2))
    p = precondition(prediction, node.alpha, node.sigma)
    target = p.a[:, None] * x_0 + p.b[:, None] * eps
    seen = {}

    def network(x, c_noise, cond):
        seen.update(x=x, c_noise=c_noise, cond=cond)
        return target

    x_t = node.alpha[:, None] * x_0 + node.sigma[:, None] * eps
    denoised = make_denoiser(network, process, prediction)(x_t, node, "cond")
    # what float32 leaves of x_0 where alpha is small and the noise is divided by it
    tolerance = 3e-6 * (1 + (node.sigma / node.alpha)[:, None])
    assert np.all(np.abs(denoised - x_0) < tolerance * 4)
    assert seen["cond"] == "cond"
    np.testing.assert_allclose(seen["c_noise"], process.c_noise(node.t))
    assert jnp.abs(seen["x"]).max() < 6  # the network is never fed an exploding variance


def test_the_last_node_of_zero_terminal_snr_is_finite_but_for_eps():
    for prediction in ("x0", "v", "flow", "edm"):
        p = precondition(prediction, jnp.float32(0), jnp.float32(1))
        assert np.isfinite([p.c_skip, p.c_out]).all(), prediction
    assert not np.isfinite(precondition("eps", jnp.float32(0), jnp.float32(1)).c_out)


def test_unknown_prediction():
    with pytest.raises(JaxdiffError, match="eps, x0, v, flow, score, edm"):
        precondition("epsilon", jnp.ones(()), jnp.ones(()))
