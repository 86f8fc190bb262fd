"""The discriminator computes what its layers say, of each image alone."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.discriminator import PatchDiscriminator

RNG = np.random.default_rng(0)
TINY = {"channels": 4, "num_groups": 4}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def prepared(model: PatchDiscriminator, x: jax.Array) -> dict:
    """Parameters without the zeros, the ones and the small numbers that networks begin with."""
    shapes = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    drawn = {k: 0.3 * normal(*s.shape) + (k[-1] == "scale") for k, s in shapes.items()}
    return {"params": flax.traverse_util.unflatten_dict(drawn)}


def convolved(x: np.ndarray, layer: dict, stride: int) -> np.ndarray:
    """A 4x4 convolution of the image padded by one pixel, from its definition."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijcd->bhwd", windows, layer["kernel"]) + layer["bias"]


def normalised(x: np.ndarray, layer: dict, groups: int) -> np.ndarray:
    b, h, w, c = x.shape
    grouped = x.reshape(b, h * w, groups, c // groups)
    grouped = grouped - grouped.mean((1, 3), keepdims=True)
    grouped /= np.sqrt((grouped**2).mean((1, 3), keepdims=True) + 1e-5)
    return grouped.reshape(b, h, w, c) * layer["scale"] + layer["bias"]


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.2 * x)


def test_logits_are_those_of_the_layers_by_numpy():
    model, x = PatchDiscriminator(**TINY, num_layers=2), normal(2, 21, 16, 3)
    params = prepared(model, x)
    got = jax.jit(model.apply)(params, x)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    h = leaky(convolved(np.asarray(x, np.float64), p.pop("main_0"), 2))
    h = leaky(normalised(convolved(h, p.pop("main_2"), 2), p.pop("main_3"), 4))
    h = leaky(normalised(convolved(h, p.pop("main_5"), 1), p.pop("main_6"), 4))
    expected = convolved(h, p.pop("main_8"), 1)[..., 0]
    assert not p  # all were used
    assert expected.shape == (2, 3, 2)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("options", "shape", "logits"),
    [
        ({}, (28, 28, 1), (1, 1)),
        ({}, (256, 256, 3), (30, 30)),
        ({}, (24, 47, 3), (1, 3)),
        ({"num_layers": 1}, (8, 8, 1), (2, 2)),
        ({"num_layers": 5, "dtype": jnp.bfloat16}, (96, 128, 3), (1, 2)),
    ],
)
def test_shapes_and_dtypes(options, shape, logits):
    model = PatchDiscriminator(**options)
    got, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, *shape)))
    assert (got.shape, got.dtype) == ((2, *logits), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    layers = variables["params"].values()
    widths = [layer["kernel"].shape[-1] for layer in layers if "kernel" in layer]
    assert sorted(widths) == sorted([64 * min(2**i, 8) for i in range(options.get("num_layers", 3) + 1)] + [1])


def test_the_parameters_are_the_reference_s_and_a_bias_for_each_norm():
    """Rombach et al.'s NLayerDiscriminator has 2,765,633 on colour, and no bias where a norm follows.

    A batch norm takes a channel's bias away; of the biases of a group, the norm here leaves the differences.
    """
    shapes = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_765_633 + 128 + 256 + 512


def test_an_image_s_logits_do_not_depend_on_its_batch():
    model, x = PatchDiscriminator(**TINY, num_layers=2), normal(3, 16, 16, 1)
    params = prepared(model, x)
    apply = jax.jit(model.apply)
    logits = apply(params, x)
    alone = apply(params, jnp.stack([x[1], 9 * x[0] + 5, -x[2]]))[0]
    np.testing.assert_allclose(alone, logits[1], rtol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_all_parameters_learn():
    model, x = PatchDiscriminator(**TINY, num_layers=2), normal(2, 16, 16, 1)
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(model.apply(params, x) ** 2)))(prepared(model, x))
    for path, leaf in flax.traverse_util.flatten_dict(gradient).items():
        assert np.all(np.isfinite(leaf)), path
        # with as many groups as it is wide a norm would take a bias away; the narrowest has two channels a group
        assert np.abs(leaf).max() > 1e-6, path


@pytest.mark.parametrize(
    ("options", "shape", "said"),
    [
        ({}, (23, 28, 1), "num_layers 3 needs images of at least 24x24, and these are 23x28"),
        ({"num_layers": 4}, (64, 28, 1), "needs images of at least 48x48, and these are 64x28: .*fewer num_layers"),
        ({"channels": 6}, (28, 28, 1), "num_groups 32, and 12 does not"),
    ],
)
def test_mistakes_are_told(options, shape, said):
    with pytest.raises(JaxdiffError, match=said):
        jax.eval_shape(PatchDiscriminator(**options).init, jax.random.key(0), jnp.zeros((1, *shape)))
