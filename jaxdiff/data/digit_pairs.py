"""Two handwritten digits on one canvas with a caption that says which and where, made as they are asked for."""

from typing import NamedTuple

import numpy as np

from jaxdiff.data.dataset import ImageDataset
from jaxdiff.data.digits import open_digits
from jaxdiff.errors import JaxdiffError

SIDE = 16
_ALL = [(first, second) for first in range(10) for second in range(10)]
HELD_OUT = frozenset((first, second) for first, second in _ALL if (3 * first + second) % 5 == 0)
"""Ordered pairs, a fifth of all, which the split "train" never shows: every digit is in both places of others."""

_PAIRS = {"train": [pair for pair in _ALL if pair not in HELD_OUT], "test": [pair for pair in _ALL if pair in HELD_OUT]}
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIZE = 1 << 20  # of the split "train"; drawn from the index, so that it costs nothing


class Scene(NamedTuple):
    """What a canvas shows: the digit at the left or the top, and that at the right or the bottom."""

    first: int
    second: int
    stacked: bool


def named(digit: int, word: bool, article: bool) -> str:
    """A digit as a caption names it: "a three", "an 8", "seven"."""
    name = _NAMES[digit] if word else str(digit)
    return f"{'an' if digit == 8 else 'a'} {name}" if article else name


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """One of the captions of a scene: by either digit, in words or numerals, with or without articles."""
    word, article, form = rng.random() < 0.5, rng.random() < 0.7, rng.integers(4)
    first, second = (named(digit, word, article) for digit in scene[:2])
    before = ("above", "on top of", "over") if scene.stacked else ("left of", "to the left of")
    after = ("below", "under", "beneath") if scene.stacked else ("right of", "to the right of")
    if form == 0:
        ends = ("top", "bottom") if scene.stacked else ("left", "right")
        return f"{first} at the {ends[0]} and {second} at the {ends[1]}"
    if form == 1:
        return f"{second} {after[rng.integers(len(after))]} {first}"
    return f"{first} {before[rng.integers(len(before))]} {second}"


def halves(images: np.ndarray, stacked: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second digit [B, 8, 8, C] of canvases [B, 16, 16, C] of one layout."""
    middle = slice(SIDE // 4, 3 * SIDE // 4)
    if stacked:
        return images[:, : SIDE // 2, middle], images[:, SIDE // 2 :, middle]
    return images[:, middle, : SIDE // 2], images[:, middle, SIDE // 2 :]


def scenes(split: str, indices: np.ndarray) -> list[Scene]:
    """What the examples of a split show."""
    return [_scene(split, index)[0] for index in np.asarray(indices).tolist()]


def _scene(split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """The scene of an example, and the randomness that is left for its image and its caption."""
    pairs = _PAIRS[split]
    rng = np.random.default_rng((int(split == "test"), index))
    return Scene(*pairs[rng.integers(len(pairs))], stacked=bool(rng.integers(2))), rng


def open_digit_pairs(split: str = "train") -> ImageDataset:
    """Open the pairs: 16x16 grey canvases with captions.

    "train" has all pairs but the `HELD_OUT`, of scikit-learn's first 1500 digits; "test" has those, of the last 297.
    Example i is a function of the split and i. Raises JaxdiffError for another split.
    """
    if split not in _PAIRS:
        raise JaxdiffError(f'the data set "digit_pairs" has no split "{split}": choose train or test')
    digits = open_digits(split)
    drawn = digits.read(np.arange(digits.size))
    by_digit = [drawn["image"][drawn["label"] == digit] for digit in range(10)]

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        images = np.zeros((len(indices), SIDE, SIDE, 1), np.uint8)
        captions = np.empty(len(indices), object)
        for row, index in enumerate(np.asarray(indices).tolist()):
            scene, rng = _scene(split, index)
            for place, digit in zip(halves(images[row : row + 1], scene.stacked), scene[:2], strict=True):
                place[0] = by_digit[digit][rng.integers(len(by_digit[digit]))]
            captions[row] = describe(scene, rng)
        return {"image": images, "label": np.zeros(len(indices), np.int32), "caption": captions}

    return ImageDataset(read, _SIZE if split == "train" else 4096, (SIDE, SIDE, 1), (), captions=True)
