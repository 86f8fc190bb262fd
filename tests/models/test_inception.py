"""The FID's Inception computes what pytorch-fid's does with the same weights, read from a file of the same layout."""

from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_inception_fixtures import random_weights
from test_lpips import write, write_shapes

from jaxdiff.errors import JaxdiffError
from jaxdiff.metrics import inception_features
from jaxdiff.models.inception import NUM_FEATURES, Inception, inception_input, load_inception

REFERENCE = np.load(Path(__file__).parent.parent / "fixtures" / "inception.npz")
IN_TORCH = {"kernel": "conv.weight", "scale": "bn.weight", "bias": "bn.bias"}
IN_TORCH |= {"mean": "bn.running_mean", "var": "bn.running_var"}


@pytest.fixture(scope="module")
def shapes():
    """Of the weights in the published file, by name."""
    like = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))["params"]
    flat = flax.traverse_util.flatten_dict(like)
    named = {".".join([*path[:-1], IN_TORCH[path[-1]]]): leaf.shape for path, leaf in flat.items()}
    return {k: (s[3], s[2], s[0], s[1]) if len(s) == 4 else s for k, s in named.items()}


def test_it_has_the_weights_of_the_network_of_2015(shapes):
    assert sum(int(np.prod(s)) for s in shapes.values()) == 21_785_568 + 2 * 17_216  # with the running statistics
    assert shapes["Mixed_6e.branch7x7dbl_4.conv.weight"] == (192, 192, 7, 1)
    assert shapes["Mixed_7c.branch3x3dbl_3a.conv.weight"] == (384, 384, 1, 3)
    assert len(shapes) == 5 * 94


@pytest.mark.slow
def test_the_features_are_those_of_pytorch_fid(shapes, tmp_path):
    params = load_inception(write(tmp_path / "inception.pth", random_weights(shapes)))
    x = REFERENCE["@x"].astype(np.float32).transpose(0, 2, 3, 1)
    within = lambda module, _: module.name in ("Mixed_6e",)  # noqa: E731
    run = jax.jit(lambda params, x: Inception().apply(params, x, capture_intermediates=within, mutable="intermediates"))
    features, seen = run(params, x)
    assert features.shape == (2, NUM_FEATURES)
    middle = seen["intermediates"]["Mixed_6e"]["__call__"][0]
    np.testing.assert_allclose(middle.mean((1, 2)), REFERENCE["@768"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features, REFERENCE["@2048"], rtol=1e-3, atol=1e-4)


def test_images_are_enlarged_as_pytorch_fid_does():
    small = REFERENCE["@small"].astype(np.float32).transpose(0, 2, 3, 1)
    large = inception_input(small)
    assert large.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(large[0, [0, 1, 4, 150, 297, 298], :, 0], REFERENCE["@enlarged"], atol=1e-5)
    np.testing.assert_array_equal(large[..., 0], large[..., 2])


def test_what_can_not_be_is_told(shapes, tmp_path):
    with pytest.raises(JaxdiffError, match=r"no weights of Inception at .*: fetch https://github.com/mseitzer"):
        inception_features(tmp_path / "none.pth")
    lacking = dict(list(shapes.items())[:-1])
    with pytest.raises(JaxdiffError, match=r"has no .*: it is not the file of https"):
        load_inception(write_shapes(tmp_path / "a.pth", lacking))
    other = shapes | {"Conv2d_1a_3x3.conv.weight": (32, 3, 5, 5)}
    with pytest.raises(JaxdiffError, match=r"\(5, 5, 3, 32\) where \(3, 3, 3, 32\) is needed"):
        load_inception(write_shapes(tmp_path / "b.pth", other))
    with pytest.raises(JaxdiffError, match="at least 75x75"):
        jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 60, 80, 3)))
    with pytest.raises(JaxdiffError, match="1 or 3 channels"):
        inception_input(jnp.zeros((1, 8, 8, 2)))
