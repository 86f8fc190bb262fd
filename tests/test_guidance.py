"""Guidance and thresholds by their formulas."""

import jax.numpy as jnp
import numpy as np

from jaxdiff.guidance import classifier_free_guidance, clip_x0, condition, dynamic_threshold
from jaxdiff.schedules import Node

NODE = Node(jnp.float32(10.0), jnp.float32(0.8), jnp.float32(0.6))
X = jnp.linspace(-2, 2, 24).reshape(3, 8)


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


def test_clip():
    np.testing.assert_array_equal(clip_x0(lambda x, node: x)(X, NODE), np.clip(X, -1, 1))


def test_dynamic_threshold_is_saharia_s():
    thresholded = dynamic_threshold(lambda x, node: x, percentile=90)(X, NODE)
    for row, got in zip(np.asarray(X), thresholded, strict=True):
        s = max(np.percentile(np.abs(row), 90), 1.0)
        np.testing.assert_allclose(got, np.clip(row, -s, s) / s, rtol=1e-5)
    assert np.abs(thresholded[1] - X[1]).max() == 0  # what lies within [-1, 1] stays as it is
