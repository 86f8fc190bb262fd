"""Pairs of digits: what a caption says is what the canvas shows, and what is held out never appears in training."""

import re

import numpy as np
import pytest

from jaxdiff.data import batches, open_dataset
from jaxdiff.data.digit_pairs import HELD_OUT, Scene, describe, halves
from jaxdiff.errors import JaxdiffError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FIRST = r"above|on top of|over|left of|to the left of"
SECOND = r"below|under|beneath|right of|to the right of"


def read_caption(caption):
    """The scene of a caption, read with a grammar of its own."""
    digit = "(?:an? )?(" + "|".join([*NAMES, *"0123456789"]) + ")"
    value = lambda word: NAMES.index(word) if word in NAMES else int(word)  # noqa: E731
    if match := re.fullmatch(rf"{digit} at the (top|left) and {digit} at the (bottom|right)", caption):
        return Scene(value(match[1]), value(match[3]), stacked=match[2] == "top")
    match = re.fullmatch(rf"{digit} ({FIRST}|{SECOND}) {digit}", caption)
    a, relation, b = value(match[1]), match[2], value(match[3])
    stacked = relation in ("above", "on top of", "over", "below", "under", "beneath")
    return Scene(a, b, stacked) if re.fullmatch(FIRST, relation) else Scene(b, a, stacked)


@pytest.fixture(scope="module")
def classify():
    """The digit of each image [B, 8, 8, 1], by its nearest neighbour among scikit-learn's own."""
    digits = open_dataset("digits", "all")
    known = digits.read(np.arange(digits.size))
    table = known["image"].reshape(digits.size, -1).astype(int)

    def nearest(images):
        flat = images.reshape(len(images), -1).astype(int)
        distance = ((flat[:, None] - table[None]) ** 2).sum(-1)
        assert np.all(distance.min(1) == 0)  # real digits, whole and in their places
        return known["label"][distance.argmin(1)]

    return nearest


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_caption_says_what_its_canvas_shows(split, classify):
    batch = open_dataset("digit_pairs", split).read(np.arange(200))
    assert batch["image"].shape == (200, 16, 16, 1)
    assert batch["image"].dtype == np.uint8
    scenes = [read_caption(caption) for caption in batch["caption"]]
    for stacked in (False, True):
        rows = [row for row, scene in enumerate(scenes) if scene.stacked == stacked]
        assert len(rows) > 60
        shown = [classify(half) for half in halves(batch["image"][rows], stacked)]
        assert [(scenes[row].first, scenes[row].second) for row in rows] == list(zip(*shown, strict=True))


def test_held_out_pairs_are_in_the_test_split_alone():
    pairs = {
        split: {read_caption(text)[:2] for text in open_dataset("digit_pairs", split).read(np.arange(3000))["caption"]}
        for split in ("train", "test")
    }
    assert len(HELD_OUT) == 20
    assert pairs["test"] == HELD_OUT
    assert not pairs["train"] & HELD_OUT
    assert len(pairs["train"]) == 80
    for place in (0, 1):
        assert {pair[place] for pair in pairs["train"]} == set(range(10))


def test_a_scene_has_many_captions_that_all_mean_it():
    rng = np.random.default_rng(0)
    for scene in (Scene(8, 1, False), Scene(1, 8, True)):
        captions = {describe(scene, rng) for _ in range(300)}
        assert len(captions) >= 20
        assert {read_caption(caption) for caption in captions} == {scene}
        assert not any("a 8" in caption or "a eight" in caption or "an 1" in caption for caption in captions)


def test_an_example_is_a_function_of_its_index():
    dataset = open_dataset("digit_pairs")
    whole, part = dataset.read(np.arange(10)), dataset.read(np.array([7, 3]))
    for key in ("image", "caption"):
        np.testing.assert_array_equal(part[key], whole[key][[7, 3]])
    batch = batches(dataset, 8, seed=3)[5]
    np.testing.assert_array_equal(batch["image"], batches(dataset, 8, seed=3)[5]["image"])
    assert len({image.tobytes() for image in batch["image"]}) == 8


def test_mistakes_are_told():
    with pytest.raises(JaxdiffError, match="choose train or test"):
        open_dataset("digit_pairs", "eval")
    with pytest.raises(JaxdiffError, match="16x16 and grey"):
        open_dataset("digit_pairs", image_size=32)
