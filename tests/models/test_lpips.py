"""LPIPS measures what the package lpips measures with the same weights, and has a gradient everywhere."""

from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_lpips_fixtures import random_weights
from test_diffusers_layout import from_diffusers, nhwc
from test_torch_files import dictionary, storage, tensor, write_zip

from jaxdiff.errors import JaxdiffError
from jaxdiff.models.lpips import LPIPS, _unit_length, load_lpips

REFERENCE = np.load(Path(__file__).parent.parent / "fixtures" / "lpips.npz")


def write(path: Path, weights: dict[str, np.ndarray]) -> Path:
    """Weights as torch.save would write them."""
    body = {k: tensor(storage(k), w.shape, [n // 4 for n in w.strides]) for k, w in weights.items()}
    return write_zip(path, dictionary(body), {k: w.tobytes() for k, w in weights.items()})


def write_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """Weights of these shapes that take no room: one number, expanded."""
    body = {k: tensor(storage("0"), shape, [0] * len(shape)) for k, shape in shapes.items()}
    return write_zip(path, dictionary(body), {"0": np.float32([1]).tobytes()})


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def params(weights, tmp_path_factory):
    """The weights, through the files that they are published in."""
    folder = tmp_path_factory.mktemp("lpips")
    paths = [write(folder / f"{i}.pth", part) for i, part in enumerate(weights)]
    loaded = load_lpips(*paths)
    for path in paths:
        path.unlink()
    return loaded


@pytest.fixture(scope="module")
def layout():
    image = jnp.zeros((1, 16, 16, 3))
    return flax.traverse_util.flatten_dict(jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"])


@jax.jit
def compare(params, x, y):
    """Distances, and the gradient of each in its y."""
    distances, pull_back = jax.vjp(lambda y: LPIPS().apply(params, x, y), y)
    return distances, pull_back(jnp.ones_like(distances))[0]


@pytest.mark.parametrize("kind", ["colour", "grey"])
def test_distances_and_gradients_equal_the_package_s(kind, params):
    x, y, gradient = (nhwc(REFERENCE[f"{kind}@{name}"]) for name in ("x", "y", "gradient"))
    distances, got = compare(params, x, y)
    assert distances.dtype == jnp.float32
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(distances, REFERENCE[f"{kind}@distance"], rtol=1e-5)
    np.testing.assert_allclose(got, gradient, atol=3e-5 * np.abs(gradient).max(), rtol=0)


def test_the_distance_is_symmetric(params):
    x, y = nhwc(REFERENCE["colour@x"]), nhwc(REFERENCE["colour@y"])
    np.testing.assert_allclose(compare(params, y, x)[0], REFERENCE["colour@distance"], rtol=1e-5)


def test_equal_images_are_at_no_distance_and_it_is_least_there(params):
    images = nhwc(REFERENCE["colour@x"]).at[1].set(0)
    distances, gradient = compare(params, images, images)
    # only rounding is left, since x and y are compiled apart; that of features is 1e-7, and it is squared
    np.testing.assert_allclose(distances, 0, atol=1e-11)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_the_gradient_is_finite_where_no_feature_responds(params):
    """A first layer that only dark leaves silent, and no biases: all features of a black image are zero."""
    flat = flax.traverse_util.flatten_dict(params)
    flat = {path: jnp.zeros_like(leaf) if path[-1] == "bias" else leaf for path, leaf in flat.items()}
    first = ("params", "features_0", "kernel")
    blind = flax.traverse_util.unflatten_dict(flat | {first: jnp.abs(flat[first])})
    bright = 0.5 + 0.5 * nhwc(REFERENCE["colour@x"])
    black = -jnp.ones_like(bright)
    mixed = bright.at[1].set(-1)
    distances, gradient = compare(blind, mixed[::-1], mixed)
    assert np.all(distances > 0.1)
    assert np.all(np.isfinite(gradient))
    assert np.abs(gradient[0]).max() > 0
    np.testing.assert_array_equal(gradient[1], 0)  # a rectifier that is silent has no slope
    for of_equals in compare(blind, black, black):
        np.testing.assert_array_equal(of_equals, 0)


def test_the_gradient_of_no_length_is_no_nan():
    """That of rectifiers would hide it above, as they select and do not multiply; other uses may not."""
    features = jnp.zeros((1, 1, 2, 2)).at[0, 0, 1].set(jnp.array([3.0, 4.0]))
    unit, pull_back = jax.vjp(_unit_length, features)
    np.testing.assert_allclose(unit[0, 0], [[0, 0], [0.6, 0.8]], rtol=1e-6)
    (gradient,) = pull_back(jnp.zeros_like(unit).at[..., 0].set(1))
    np.testing.assert_allclose(gradient[0, 0], [[1e10, 0], [0.128, -0.096]], rtol=1e-5)


def test_parameters_are_the_published_ones_by_renaming(weights, params, layout):
    given = from_diffusers(weights[0] | weights[1], layout)
    loaded = flax.traverse_util.flatten_dict(params["params"])
    shapes = lambda tree: {k: (v.shape, v.dtype) for k, v in tree.items()}  # noqa: E731
    assert shapes(given) == shapes(loaded) == shapes(layout)
    assert sum(leaf.size for leaf in loaded.values()) == 14_714_688 + 1_472
    for path, leaf in given.items():
        np.testing.assert_array_equal(loaded[path], leaf)


def test_half_the_width_inside_and_float32_outside():
    image = jax.ShapeDtypeStruct((2, 28, 20, 1), jnp.bfloat16)
    model = LPIPS(dtype=jnp.bfloat16)
    distances, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image, image)
    assert (distances.shape, distances.dtype) == ((2,), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((2, 15, 40, 3),) * 2, "at least 16x16, .*these are 15x40"),
        (((2, 16, 8, 3),) * 2, "at least 16x16, .*these are 16x8"),
        (((2, 16, 16, 4),) * 2, "of 1 or 3 channels, and these are .2, 16, 16, 4"),
        (((16, 16, 3),) * 2, r"images \[B, H, W, C\]"),
        (((2, 16, 16, 3), (1, 16, 16, 3)), "of one shape, and these are .2, 16, 16, 3. and .1, 16, 16, 3"),
    ],
)
def test_mistakes_are_told(shapes, said):
    with pytest.raises(JaxdiffError, match=said):
        jax.eval_shape(LPIPS().init, jax.random.key(0), *map(jnp.zeros, shapes))


def test_files_that_lack_a_weight_are_told(weights, tmp_path):
    vgg16, heads = ({name: weight.shape for name, weight in part.items()} for part in weights)
    whole = write_shapes(tmp_path / "vgg16.pth", vgg16 | {"classifier.0.bias": (4096,)})
    whole_heads = write_shapes(tmp_path / "heads.pth", heads)
    assert load_lpips(whole, whole_heads)["params"]["features_28"]["kernel"].shape == (3, 3, 512, 512)

    lacking = write_shapes(tmp_path / "lacking.pth", {k: vgg16[k] for k in list(vgg16)[:20]})
    with pytest.raises(JaxdiffError, match=r"lacking\.pth has no features\.24\.weight: .*torchvision's vgg16"):
        load_lpips(lacking, whole_heads)
    # vgg16_bn counts its norms
    other = write_shapes(tmp_path / "other.pth", vgg16 | {"features.2.bias": (7,), "features.5.bias": (7,)})
    with pytest.raises(JaxdiffError, match=r"features\.2\.bias in .*other\.pth is \(7,\) where \(64,\) is needed"):
        load_lpips(other, whole_heads)
    with pytest.raises(JaxdiffError, match=r"heads\.pth has no features\.0\.weight: .* in this order"):
        load_lpips(whole_heads, whole)
    alex = write_shapes(tmp_path / "alex.pth", heads | {"lin1.model.1.weight": (1, 192, 1, 1)})
    with pytest.raises(JaxdiffError, match=r"lin1\.model\.1\.weight in .*alex\.pth is \(1, 192, 1, 1\)"):
        load_lpips(whole, alex)
    with pytest.raises(JaxdiffError, match=r"There is no file .*nowhere\.pth"):
        load_lpips(whole, tmp_path / "nowhere.pth")
