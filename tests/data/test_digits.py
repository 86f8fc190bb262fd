"""The embedded digits, against scikit-learn's own arrays."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError


@pytest.mark.parametrize(("split", "start", "stop"), [("train", 0, 1500), ("test", 1500, 1797), ("all", 0, 1797)])
def test_splits_and_grey_levels(split, start, stop):
    digits = load_digits()
    dataset = open_dataset("digits", split)
    assert dataset.size == stop - start
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.class_names == tuple("0123456789")
    examples = dataset.read(np.arange(dataset.size))
    levels = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    expected = np.array(levels)[digits.images[start:stop].astype(int)]
    np.testing.assert_array_equal(examples["image"][..., 0], expected)
    np.testing.assert_array_equal(examples["label"], digits.target[start:stop])


def test_size_and_channels():
    dataset = open_dataset("digits", image_size=16, channels=3)
    image = dataset.read(np.array([0]))["image"]
    assert image.shape == (1, 16, 16, 3) == (1, *dataset.image_shape)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_unknown_split_lists_them():
    with pytest.raises(JaxdiffError, match='no split "valid": choose one of train, test, all'):
        open_dataset("digits", "valid")
