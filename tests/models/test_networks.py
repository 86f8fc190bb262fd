"""Shapes, conditions and parts of the networks; their arithmetic is held to diffusers in test_diffusers_layout.py."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.models import Condition, CrossAttention, SimpleUNet, UNet, sinusoidal_embedding
from jaxdiff.models.layers import GroupNorm, upsample_nearest

RNG = np.random.default_rng(0)
TINY = {"channels": (8, 16), "layers_per_block": 1, "attention_levels": (1,), "num_groups": 4, "out_channels": 1}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def randomised(params, key=0):
    """Parameters without the zeros that networks begin with."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return jax.tree.unflatten(
        tree, [0.1 * jax.random.normal(k, x.shape) + x for k, x in zip(keys, leaves, strict=True)]
    )


def prepared(model, x, cond=None):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(x.shape[0]), cond)
    return randomised(jax.tree.map(lambda s: jnp.zeros(s.shape), shapes))


def test_sinusoidal_embedding_is_the_course_s():
    got = sinusoidal_embedding(jnp.float32([0, 7, 999]), 8)
    f = np.exp(-np.log(10000) / 3 * np.arange(4))
    angles = np.array([0, 7, 999])[:, None] * f
    np.testing.assert_allclose(got, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=2e-4)
    flipped = sinusoidal_embedding(jnp.float32([7]), 8, flip_sin_to_cos=True)
    np.testing.assert_allclose(flipped[0, :4], got[1, 4:])
    assert sinusoidal_embedding(jnp.float32([7]), 9).shape == (1, 9)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_equals_linen_s(groups):
    x = 3 * normal(2, 5, 4, 8) + 2
    scale, bias = normal(8), normal(8)
    params = {"params": {"scale": scale, "bias": bias}}
    expected = nn.GroupNorm(groups, epsilon=1e-5).apply(params, x)
    np.testing.assert_allclose(GroupNorm(groups).apply(params, x), expected, atol=1e-4)


def test_upsample_repeats_pixels():
    x = normal(1, 2, 3, 2)
    np.testing.assert_array_equal(upsample_nearest(x), np.repeat(np.repeat(x, 2, 1), 2, 2))


def test_cross_attention_equals_a_plain_softmax():
    x, context = normal(2, 5, 6), normal(2, 7, 3)
    mask = jnp.asarray(RNG.random((2, 7)) < 0.6).at[:, 0].set(True)
    module = CrossAttention(heads=2, dim_head=4)
    params = randomised(module.init(jax.random.key(0), x, context))
    p = params["params"]
    assert set(p["to_q"]) == set(p["to_k"]) == set(p["to_v"]) == {"kernel"}
    assert set(p["to_out_0"]) == {"kernel", "bias"}
    q, k, v = (
        np.asarray(a @ p[name]["kernel"], float) for a, name in ((x, "to_q"), (context, "to_k"), (context, "to_v"))
    )
    out = np.zeros((2, 5, 8))
    for b in range(2):
        for h in range(2):
            part = slice(4 * h, 4 * h + 4)
            weights = np.exp(q[b, :, part] @ k[b, :, part].T / 2) * np.asarray(mask[b])
            out[b, :, part] = weights / weights.sum(1, keepdims=True) @ v[b, :, part]
    expected = out @ p["to_out_0"]["kernel"] + p["to_out_0"]["bias"]
    np.testing.assert_allclose(module.apply(params, x, context, mask), expected, atol=1e-5)


def test_masked_context_is_not_looked_at():
    model = UNet(**{**TINY, "channels": (8,), "attention_levels": ()}, context_dim=6)
    x, context = normal(2, 8, 8, 1), normal(2, 5, 6)
    mask = jnp.asarray([[True, True, False, False, False]] * 2)
    params = prepared(model, x, Condition(context=context, context_mask=mask))
    apply = jax.jit(lambda c, m: model.apply(params, x, jnp.ones(2), Condition(context=c, context_mask=m)))
    other = context.at[:, 2:].set(9.0)
    np.testing.assert_allclose(apply(context, mask), apply(other, mask), atol=1e-5)
    assert np.abs(apply(context, mask) - apply(other, jnp.ones_like(mask))).max() > 1e-3


@pytest.mark.parametrize("size", [(28, 28), (9, 14), (3, 2)])
def test_simple_unet_takes_any_size(size):
    model = SimpleUNet(channels=(8, 16), time_dim=16)
    x = normal(2, *size, 1)
    params = prepared(model, x)
    apply = jax.jit(model.apply)
    one, other = (apply(params, x, jnp.full(2, t)) for t in (1.0, 500.0))
    assert one.shape == x.shape
    assert np.abs(one - other).max() > 1e-3  # time matters


def test_simple_unet_is_the_course_s_plan():
    model = SimpleUNet()
    assert (model.channels, model.time_dim) == ((64, 128, 256), 256)
    p = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)), jnp.zeros(1))["params"]
    widths = {name: p[name]["conv1"]["kernel"].shape[2:] for name in p if "conv1" in p[name]}
    assert widths == {
        "down_0": (1, 64), "down_1": (64, 128), "down_2": (128, 256), "bottom": (256, 256),
        "up_2": (512, 256), "up_1": (384, 128), "up_0": (192, 64),
    }  # fmt: skip
    assert p["out"]["kernel"].shape == (64, 1)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_unet_sees_time_and_class(scale_shift):
    model = UNet(**TINY, num_class_embeds=3, scale_shift=scale_shift, patch_size=2)
    x = normal(2, 8, 8, 1)
    params = prepared(model, x, Condition(label=jnp.zeros(2, int)))
    apply = jax.jit(lambda t, label: model.apply(params, x, jnp.full(2, t), Condition(label=jnp.full(2, label))))
    base = apply(1.0, 0)
    assert base.shape == x.shape
    assert np.abs(base - apply(300.0, 0)).max() > 1e-3
    assert np.abs(base - apply(1.0, 1)).max() > 1e-3


def test_dropout_acts_in_training_alone():
    model = UNet(**TINY, dropout=0.5)
    x = normal(1, 8, 8, 1)
    params = prepared(model, x)

    @partial(jax.jit, static_argnames="train")
    def apply(key, train):
        return model.apply(params, x, jnp.ones(1), train=train, rngs={"dropout": key})

    one, other = jax.random.split(jax.random.key(0))
    assert np.abs(apply(one, True) - apply(other, True)).max() > 1e-4
    np.testing.assert_array_equal(apply(one, False), apply(other, False))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    wide, narrow = UNet(**TINY), UNet(**TINY, dtype=jnp.bfloat16)
    x = normal(2, 8, 8, 1)
    params = prepared(wide, x)
    made = jax.eval_shape(narrow.init, jax.random.key(0), x, jnp.zeros(2))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    a, b = (jax.jit(model.apply)(params, x, jnp.ones(2)) for model in (wide, narrow))
    assert b.dtype == jnp.float32
    difference = np.abs(a - b).max() / np.abs(a).max()
    assert 1e-5 < difference < 0.05


def test_a_fresh_unet_answers_zero():
    model, x = UNet(**TINY), normal(1, 8, 8, 1)
    params = jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(1))
    np.testing.assert_array_equal(jax.jit(model.apply)(params, x, jnp.ones(1)), 0)


def test_simple_unet_s_widths_divide_into_groups():
    with pytest.raises(JaxdiffError, match="num_groups 8, and 12 does not"):
        jax.eval_shape(SimpleUNet(channels=(12,)).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))


@pytest.mark.parametrize(
    ("options", "cond", "said"),
    [
        ({"channels": (8, 8, 8, 8, 8)}, None, "divide by 16, and these are 8x8"),
        ({"patch_size": 3}, None, "divide by 6"),
        ({"channels": (8, 10)}, None, "num_groups 4, and 10 does not"),
        ({"num_heads": 3}, None, "16 channels do not divide into heads"),
        ({"attention_levels": (2,)}, None, r"0 \.\.\. 1"),
        ({"num_class_embeds": 3}, None, "built for class labels and was called without"),
        ({}, Condition(label=jnp.zeros(1, int)), "built without class labels and was called with"),
        ({"context_dim": 4}, None, "built for a context"),
    ],
)
def test_mistakes_are_told(options, cond, said):
    model = UNet(**{**TINY, **options})
    with pytest.raises(JaxdiffError, match=said):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), cond)
