"""Guidance, thresholds and inpainting by their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.guidance import (
    autoguidance,
    classifier_free_guidance,
    clip_x0,
    condition,
    dynamic_threshold,
    guidance_interval,
    inpaint,
)
from jaxdiff.sampling import example_keys, sample
from jaxdiff.schedules import Node, make_process
from jaxdiff.solvers import ddim, ddpm, make_grid

NODE = Node(jnp.float32(10.0), jnp.float32(0.8), jnp.float32(0.6))
X = jnp.linspace(-2, 2, 24).reshape(3, 8)

RNG = np.random.default_rng(0)
STRONG, WEAK = (RNG.normal(size=(3, 4, 5, 2)) * [[[[s]]] for s in (0.1, 1, 3)] + 0.2 for _ in range(2))
IMAGES = jnp.zeros(STRONG.shape)
GRID = make_grid(make_process("linear"), 10)


def given(x, node, cond):
    """A network whose prediction is its condition."""
    return cond


def rescaled(strong, weak, scale, phi):
    """Equations 15 and 16 of Lin et al. 2024, one image at a time in float64; scale and phi: [B]."""
    images = []
    for d1, d0, w, mix in zip(strong, weak, scale, phi, strict=True):
        cfg = d0 + w * (d1 - d0)
        images.append(mix * (cfg * np.std(d1) / np.std(cfg)) + (1 - mix) * cfg)
    return np.stack(images)


def nodes(alpha, sigma):
    return Node(jnp.zeros(len(alpha)), jnp.float32(alpha), jnp.float32(sigma))


def test_guidance_is_the_sum_over_eps_in_one_batch():
    sizes = []

    def denoise(x, node, cond):
        sizes.append(x.shape[0])
        return jnp.tanh(x * cond["a"][:, None]) + node.alpha

    cond, null = {"a": jnp.float32([1, 2, 3])}, {"a": jnp.zeros(3)}
    guided = classifier_free_guidance(denoise, cond, null, 2.5)(X, NODE)
    assert sizes == [6]
    eps = lambda c: (X - NODE.alpha * denoise(X, NODE, c)) / NODE.sigma  # noqa: E731
    mixed = eps(null) + 2.5 * (eps(cond) - eps(null))
    np.testing.assert_allclose(guided, (X - NODE.sigma * mixed) / NODE.alpha, rtol=1e-5, atol=1e-5)


def test_scale_1_is_the_condition_and_scale_0_is_none():
    denoise = lambda x, node, cond: x * cond[:, None]  # noqa: E731
    cond, null = jnp.float32([1, 2, 3]), jnp.zeros(3)
    one = classifier_free_guidance(denoise, cond, null, 1.0)(X, NODE)
    np.testing.assert_allclose(one, condition(denoise, cond)(X, NODE))
    np.testing.assert_allclose(classifier_free_guidance(denoise, cond, null, 0.0)(X, NODE), 0)


def test_scales_and_nodes_may_differ_by_example():
    denoise = lambda x, node, cond: x * cond[:, None] + node.sigma[:, None]  # noqa: E731
    node = Node(*(jnp.float32([1, 2, 3]) for _ in range(3)))
    scale = jnp.float32([0, 1, 2])
    guided = classifier_free_guidance(denoise, jnp.ones(3), jnp.zeros(3), scale)(X, node)
    np.testing.assert_allclose(guided, X * scale[:, None] + node.sigma[:, None], rtol=1e-6)


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0, np.array([0.0, 0.7, 1.0])])
@pytest.mark.parametrize("scale", [0.5, 4.0, np.array([0.0, 1.0, 7.5])])
def test_rescale_is_lin_s_by_example(scale, phi):
    guided = classifier_free_guidance(given, jnp.float32(STRONG), jnp.float32(WEAK), scale, phi)(IMAGES, NODE)
    expected = rescaled(STRONG, WEAK, np.broadcast_to(scale, 3), np.broadcast_to(phi, 3))
    np.testing.assert_allclose(guided, expected, rtol=2e-5, atol=1e-5)


def test_rescale_of_1_has_the_contrast_of_the_condition_and_of_0_that_of_guidance():
    guided = lambda *rescale: classifier_free_guidance(  # noqa: E731
        given, jnp.float32(STRONG), jnp.float32(WEAK), 6.0, *rescale
    )(IMAGES, NODE)
    np.testing.assert_allclose(np.std(guided(1.0), (1, 2, 3)), np.std(STRONG, (1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(guided(0.0), guided())
    np.testing.assert_allclose(guided(), WEAK + 6 * (STRONG - WEAK), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phi", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 8])  # over 192 pixels the mean of a constant is not that constant
def test_rescale_of_flat_images_is_finite_and_so_are_its_gradients(phi, size):
    shape = (2, size, size, 3)
    grain = np.float32(RNG.normal(size=shape))
    flat, other = np.full(shape, 0.7, np.float32), np.full(shape, 0.1, np.float32)
    pairs = {"conditional": (flat, grain), "both": (flat, other), "guided": (grain, grain / 2), "all": (flat, flat)}
    scale = {"conditional": 2.0, "both": 2.0, "guided": -1.0, "all": 2.0}  # g / 2 - (g - g / 2) = 0

    def draw(strong, weak, scale, phi):
        return classifier_free_guidance(given, strong, weak, scale, phi)(jnp.zeros(shape), NODE)

    for name, (strong, weak) in pairs.items():
        arguments = jnp.asarray(strong), jnp.asarray(weak), jnp.float32(scale[name]), jnp.float32(phi)
        guided = draw(*arguments)
        cfg = weak + scale[name] * (strong - weak)
        # A flat guided image has nothing to scale; a flat conditional one leaves no contrast to the other.
        np.testing.assert_allclose(guided, (1 - phi) * cfg if name == "conditional" else cfg, atol=1e-3)
        gradients = jax.grad(lambda *a: jnp.sum(draw(*a) ** 2), argnums=(0, 1, 2, 3))(*arguments)
        assert all(np.all(np.isfinite(g)) for g in gradients), name


def test_rescale_s_gradient_is_the_slope():
    strong, weak = jnp.float32(STRONG), jnp.float32(WEAK)

    def loss(strong, phi):
        return jnp.sum(jnp.sin(classifier_free_guidance(given, strong, weak, 3.0, phi)(IMAGES, NODE)))

    of_strong, of_phi = jax.grad(loss, argnums=(0, 1))(strong, jnp.float32(0.4))
    numpy_loss = lambda strong, phi: np.sin(rescaled(strong, WEAK, [3] * 3, [phi] * 3)).sum()  # noqa: E731
    step, h = np.zeros_like(STRONG), 1e-5
    step[1, 2, 3, 1] = h
    slope = (numpy_loss(STRONG + step, 0.4) - numpy_loss(STRONG - step, 0.4)) / (2 * h)
    np.testing.assert_allclose(of_strong[1, 2, 3, 1], slope, rtol=1e-3)
    np.testing.assert_allclose(of_phi, (numpy_loss(STRONG, 0.4 + h) - numpy_loss(STRONG, 0.4 - h)) / (2 * h), rtol=1e-3)


def test_rescale_keeps_half_precision_s_dtype():
    strong, weak = jnp.bfloat16(STRONG), jnp.bfloat16(WEAK)
    guided = classifier_free_guidance(given, strong, weak, jnp.float32(3), jnp.float32(0.5))(strong, NODE)
    assert guided.dtype == jnp.bfloat16
    expected = rescaled(STRONG, WEAK, [3] * 3, [0.5] * 3)
    np.testing.assert_allclose(np.float32(guided), expected, atol=0.02 * np.abs(expected).max())


def test_the_scale_may_be_a_function_of_the_node():
    node = nodes([1, 1, 1], [0.5, 2, 4])
    for function, scale in (lambda n: n.sigma**2, [0.25, 4, 16]), (lambda n: 3.0, [3, 3, 3]):
        guided = classifier_free_guidance(given, jnp.float32(STRONG), jnp.float32(WEAK), function, 0.5)(IMAGES, node)
        np.testing.assert_allclose(guided, rescaled(STRONG, WEAK, scale, [0.5] * 3), rtol=2e-5, atol=1e-5)


def test_guidance_interval_is_open_below_and_closed_above():
    node = nodes([1, 1, 0.5, 1, 1, 0], [0.5, 1, 0.75, 3, 3.01, 1])
    np.testing.assert_array_equal(guidance_interval(7.0, 1.0, 3.0)(node), np.float32([1, 1, 7, 7, 1, 1]))
    np.testing.assert_array_equal(guidance_interval(7.0, 1.0, np.inf)(node), np.float32([1, 1, 7, 7, 7, 7]))
    of_node = guidance_interval(lambda n: 10 * n.sigma, jnp.float32([0, 1, 2, 2, 2, 0]), 3.0)(node)
    np.testing.assert_allclose(of_node, [5, 1, 1, 30, 1, 1])
    by_example = guidance_interval(jnp.float32([2, 3]), 1.0, 3.0)
    for sigma, expected in (2.0, [2, 3]), (5.0, [1, 1]):
        scalar = Node(np.float64(0), np.float64(1), np.float64(sigma))
        np.testing.assert_array_equal(by_example(scalar), np.float32(expected))
    assert guidance_interval(7.0, 1.0, 3.0)(Node(np.float64(9), np.float64(0), np.float64(1))) == 1


def test_guidance_in_an_interval_is_the_condition_outside_and_guidance_inside():
    denoise = lambda x, node, cond: jnp.tanh(x * cond[:, None]) / (1 + node.sigma)  # noqa: E731
    cond, null = jnp.float32([1, 2, 3]), jnp.float32([0.5, 0, -1])
    limited = classifier_free_guidance(denoise, cond, null, guidance_interval(5.0, 0.3, 2.0))
    always, never = classifier_free_guidance(denoise, cond, null, 5.0), condition(denoise, cond)
    inside = 0
    for alpha, sigma in zip(GRID.alpha[:-1], GRID.sigma[:-1], strict=True):
        node = Node(*map(jnp.float32, (0, alpha, sigma)))
        inside += (within := 0.3 < sigma / alpha <= 2)
        np.testing.assert_allclose(limited(X, node), (always if within else never)(X, node), rtol=1e-6, atol=1e-6)
    assert 0 < inside < 10


def test_scale_interval_and_rescale_are_traced_once():
    traces = []

    @jax.jit
    def draw(scale, low, high, rescale):
        traces.append(1)
        interval = guidance_interval(scale, low, high)
        denoise = classifier_free_guidance(given, jnp.float32(STRONG), jnp.float32(WEAK), interval, rescale)
        weaker = autoguidance(denoise, lambda x, node: x, interval, rescale)
        return denoise(IMAGES, NODE), weaker(IMAGES, NODE)

    for numbers in (2.0, 0.1, 1.0, 0.0), (3.0, 0.1, 0.5, 0.5), (4.0, 0.0, np.inf, 1.0):
        scale, low, high, phi = map(jnp.float32, numbers)
        within = low < 0.6 / 0.8 <= high  # the node's
        expected = rescaled(STRONG, WEAK, [scale if within else 1] * 3, [phi] * 3)
        np.testing.assert_allclose(draw(scale, low, high, phi)[0], expected, rtol=2e-5, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_autoguidance_leads_away_from_the_weaker_model(phi):
    scale = np.array([0.0, 1.0, 2.5])
    strong, weak = (lambda x, node, images=images: x + images * node.alpha for images in (STRONG, WEAK))
    x = RNG.normal(size=STRONG.shape)
    guided = autoguidance(strong, weak, jnp.float32(scale), phi)(jnp.float32(x), NODE)
    expected = rescaled(x + 0.8 * STRONG, x + 0.8 * WEAK, scale, [phi] * 3)
    np.testing.assert_allclose(guided, expected, rtol=2e-5, atol=1e-5)
    plain = autoguidance(strong, weak, guidance_interval(2.0, 0.0, 0.5))(jnp.float32(x), NODE)  # outside
    np.testing.assert_allclose(plain, x + 0.8 * STRONG, rtol=1e-5, atol=1e-5)


def test_a_negative_condition_is_another_one_for_null():
    embed = np.float32([-1, 0, 0.5, 2])
    denoise = lambda x, node, label: x * jnp.asarray(embed)[label][:, None]  # noqa: E731
    wanted, unwanted = np.array([3, 2, 0]), np.array([2, 0, 3])
    guided = classifier_free_guidance(denoise, jnp.asarray(wanted), jnp.asarray(unwanted), 3.0)(X, NODE)
    towards, from_ = embed[wanted][:, None], embed[unwanted][:, None]
    np.testing.assert_allclose(guided, np.asarray(X) * (3 * towards - 2 * from_), rtol=1e-5, atol=1e-6)


def test_clip():
    np.testing.assert_array_equal(clip_x0(lambda x, node: x)(X, NODE), np.clip(X, -1, 1))


def test_dynamic_threshold_is_saharia_s():
    thresholded = dynamic_threshold(lambda x, node: x, percentile=90)(X, NODE)
    for row, got in zip(np.asarray(X), thresholded, strict=True):
        s = max(np.percentile(np.abs(row), 90), 1.0)
        np.testing.assert_allclose(got, np.clip(row, -s, s) / s, rtol=1e-5)
    assert np.abs(thresholded[1] - X[1]).max() == 0  # what lies within [-1, 1] stays as it is


def test_inpaint_mixes_by_the_mask():
    known, mask = np.float32(STRONG), RNG.uniform(size=(3, 4, 5, 1)).astype(np.float32)
    mask[0], mask[1] = 0, 1
    mixed = inpaint(lambda x, node: x, known, mask)(jnp.float32(WEAK), NODE)
    np.testing.assert_allclose(mixed, mask * known + (1 - mask) * np.float32(WEAK), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mixed[0], np.float32(WEAK)[0])
    np.testing.assert_array_equal(mixed[1], known[1])
    half = np.arange(5)[:, None] < 2  # [W, 1], of booleans
    mixed = inpaint(lambda x, node: x, known[0], half)(jnp.float32(WEAK), NODE)
    np.testing.assert_array_equal(mixed, np.where(half, known[0], np.float32(WEAK)))


@pytest.mark.parametrize("solver", [ddim, ddpm])
def test_inpainting_ends_exactly_on_what_is_known(solver):
    known, mask = jnp.float32(STRONG), np.float32(RNG.uniform(size=(3, 4, 5, 1)) < 0.5)
    denoise = lambda x, node, cond: jnp.tanh(x + cond[:, None, None, None] * node.sigma)  # noqa: E731
    guided = clip_x0(classifier_free_guidance(denoise, jnp.ones(3), jnp.zeros(3), 3.0, 0.7))
    assert np.abs(known).max() > 1  # so that a threshold around it would be seen
    x, keys = jax.random.normal(jax.random.key(0), known.shape), example_keys(jax.random.key(1), jnp.arange(3))
    draw = jax.jit(lambda table: sample(inpaint(guided, known, mask), table, x, keys))
    images, at = np.asarray(draw(solver(GRID))), np.broadcast_to(mask == 1, known.shape)
    np.testing.assert_array_equal(images[at], np.asarray(known)[at])
    assert np.all(np.isfinite(images))
    assert np.all(np.abs(images[~at]) <= 1)
    assert np.mean(images[~at] == np.asarray(known)[~at]) == 0


def test_within_ddpm_the_known_part_has_its_forward_marginal():
    number, known = 20_000, jnp.float32([[1.0, -1.0], [0.5, 0.0]])[..., None]
    mask = jnp.float32([[1, 1], [1, 0]])[..., None]
    keys = example_keys(jax.random.key(1), jnp.arange(number))
    x = jax.random.normal(jax.random.key(0), (number, 2, 2, 1))
    run = jax.jit(lambda table: sample(inpaint(lambda x, _: jnp.tanh(x), known, mask), table, x, keys, trajectory=True))
    _, passed = run(ddpm(GRID))
    assert len(passed.x) == 10
    at = np.asarray(mask[..., 0] == 1)
    for images, alpha, sigma in zip(np.asarray(passed.x, np.float64), GRID.alpha[1:], GRID.sigma[1:], strict=True):
        pixels = images[..., 0][:, at]  # [number, 3]
        error = 5 * sigma / np.sqrt(number)  # five standard errors
        np.testing.assert_allclose(pixels.mean(0), alpha * np.asarray(known[..., 0])[at], atol=error + 1e-6)
        np.testing.assert_allclose(pixels.std(0), sigma, atol=error + 1e-6)
        if sigma > 0.1:  # and its noise is independent from pixel to pixel
            np.testing.assert_allclose(np.corrcoef(pixels.T), np.eye(3), atol=5 / np.sqrt(number))


def test_within_ddim_the_known_part_keeps_its_noise():
    known, x = jnp.float32(STRONG), jnp.float32(RNG.normal(size=STRONG.shape))
    keys = example_keys(jax.random.key(1), jnp.arange(3))
    _, passed = sample(inpaint(lambda x, _: jnp.tanh(x), known, 1.0), ddim(GRID), x, keys, trajectory=True)
    noise = (np.asarray(x) - GRID.alpha[0] * STRONG) / GRID.sigma[0]
    for images, alpha, sigma in zip(passed.x, GRID.alpha[1:], GRID.sigma[1:], strict=True):
        np.testing.assert_allclose(images, alpha * STRONG + sigma * noise, rtol=1e-4, atol=1e-5)
