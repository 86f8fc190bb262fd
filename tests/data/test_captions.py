"""Captions from templates: every class in every way, and the image that each belongs to."""

import numpy as np
import pytest

from jaxdiff.data import ImageDataset, open_dataset
from jaxdiff.data.captions import NUM_VARIANTS, SYNONYMS, captioned, describe
from jaxdiff.errors import JaxdiffError


def test_a_class_is_described_in_many_ways():
    ways = {describe("Ankle boot", variant) for variant in range(NUM_VARIANTS)}
    assert len(ways) == NUM_VARIANTS
    assert {"an ankle boot", "a photo of an ankle boot", "a boot, grey"} <= ways
    assert "trousers, grey" in {describe("Trouser", variant) for variant in range(NUM_VARIANTS)}
    assert describe("airplane", 1) == "a photo of an airplane"
    assert describe("8", 0) == "an 8"
    assert not any("clothing" in describe("frog", variant) for variant in range(NUM_VARIANTS))


def test_no_two_classes_share_a_caption():
    ways = [{describe(name, variant) for variant in range(NUM_VARIANTS)} for name in SYNONYMS]
    assert len(set.union(*ways)) == sum(map(len, ways))


def test_every_image_comes_with_every_caption():
    digits = open_dataset("digits")
    dataset = captioned(digits)
    assert dataset.size == digits.size * NUM_VARIANTS
    assert dataset.captions
    index = np.array([5, digits.size + 5, 3 * digits.size + 6])
    batch, plain = dataset.read(index), digits.read(np.array([5, 5, 6]))
    np.testing.assert_array_equal(batch["image"], plain["image"])
    names = [digits.class_names[label] for label in plain["label"]]
    assert batch["caption"].tolist() == [describe(names[0], 0), describe(names[1], 1), describe(names[2], 3)]


def test_there_is_nothing_to_say_without_classes():
    plain = ImageDataset(lambda indices: {}, 3, (8, 8, 1), ())
    with pytest.raises(JaxdiffError, match="these have none"):
        captioned(plain)
