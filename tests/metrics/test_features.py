"""Features of images over all devices, whatever the batches they come in, and their cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError
from jaxdiff.images import to_float
from jaxdiff.metrics import PIXELS, Extractor, classifier_features, dataset_features, extract
from jaxdiff.models.classifier import Classifier, ImageClassifier, judge, save_classifier

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (37, 8, 8, 1), dtype=np.uint8)


def test_features_do_not_depend_on_the_batches():
    expected = to_float(IMAGES).reshape(37, -1)
    for sizes, batch_size in (([37], 16), ([1, 20, 16], 16), ([5, 32], 1), ([8, 8, 8, 8, 5], 64)):
        batches = np.split(IMAGES, np.cumsum(sizes)[:-1])
        found = extract(PIXELS, iter(batches), batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_function_of_one_s_own_is_compiled_once_and_runs_on_all_devices():
    traced, places = [], []

    def apply(params, images):
        traced.append(images.shape)
        jax.debug.inspect_array_sharding(images, callback=places.append)
        return params * images.mean((1, 2))

    found = extract(Extractor("mean", apply, jnp.float32(2)), np.split(IMAGES, 37), 16)
    np.testing.assert_allclose(found, 2 * IMAGES.mean((1, 2)), rtol=1e-5)
    assert traced == [(16, 8, 8, 1)]
    assert len(places[0].device_set) == jax.local_device_count() == 8


def test_a_classifier_s_features(tmp_path):
    model = ImageClassifier(3, channels=(32, 32), num_features=16)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    save_classifier(tmp_path / "c.npz", Classifier(model, params, ("a", "b", "c"), (8, 8, 1)))
    extractor = classifier_features(tmp_path / "c.npz")
    np.testing.assert_allclose(
        extract(extractor, [IMAGES], 64), judge(model, params, to_float(IMAGES)).features, atol=1e-5
    )
    with pytest.raises(JaxdiffError, match=r"classifier takes images of \(8, 8, 1\), and these are of \(8, 8, 3\)"):
        extract(extractor, [np.repeat(IMAGES, 3, -1)])


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([to_float(IMAGES)], "uint8 .* not of float32"),
        ([IMAGES[0]], r"not of uint8 \[8, 8, 1\]"),
        ([], "no images"),
    ],
)
def test_what_are_no_images_is_told(batches, said):
    with pytest.raises(JaxdiffError, match=said):
        extract(PIXELS, batches)


def test_a_data_set_s_features_are_kept_and_read_again(tmp_path, caplog):
    digits, source = open_dataset("digits"), {"name": "digits", "split": "train"}
    caplog.set_level("INFO", "jaxdiff")
    first = dataset_features(PIXELS, digits, source, tmp_path, num=100)
    np.testing.assert_allclose(first, to_float(digits.read(np.arange(100))["image"]).reshape(100, -1), atol=1e-6)
    assert len(caplog.messages) == 1
    np.testing.assert_array_equal(dataset_features(PIXELS, digits, source, tmp_path, num=100), first)
    assert len(caplog.messages) == 1
    scaled = lambda factor: Extractor("scaled", lambda f, x: f * to_float(x).mean((1, 2)), jnp.float32(factor))  # noqa: E731
    for extractor, other, num in (
        (PIXELS, source, 50),
        (PIXELS, source | {"split": "test"}, 100),
        (scaled(2), source, 100),
        (scaled(3), source, 100),
    ):
        dataset_features(extractor, digits, other, tmp_path, num=num)
    assert len(list(tmp_path.glob("*.npz"))) == 5
    assert dataset_features(PIXELS, digits, source, tmp_path).shape == (digits.size, 64)
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(JaxdiffError, match=r"damaged .*: delete the file"):
        dataset_features(PIXELS, digits, source, tmp_path, num=100)
