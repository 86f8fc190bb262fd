"""A data set is one function from indices to images and labels; this opens every kind of them by name."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxdiff.data.decoding import to_array
from jaxdiff.errors import JaxdiffError

logger = logging.getLogger("jaxdiff")


class ImageDataset(NamedTuple):
    """Images of one shape, read by index; reading is pure and may be done from many threads."""

    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    """Integer indices [B] to {"image": uint8 [B, H, W, C], "label": int32 [B]} and what the fields below promise."""
    size: int
    """How many examples there are: indices are 0 ... size - 1."""
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    class_names: tuple[str, ...]
    """The name of each label, or empty when there are no classes: then every label is 0."""
    captions: bool = False
    """Whether reading also gives "caption", an array [B] of str."""


def open_dataset(
    name: str,
    split: str = "train",
    *,
    data_dir: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    in_memory_bytes: int = 2 << 30,
) -> ImageDataset:
    """Open a data set by name.

    Args:
        name: "digits" (8x8 grey, within scikit-learn), "digit_pairs" (two of them on a canvas, with captions),
            "folder" (your own images, in `data_dir`), or the name that a data set of images has in tensorflow-datasets,
            such as "mnist", "cifar10" or "fashion_mnist:3.0.1".
        split: the part of it: "train", "test", or what else the data set has.
        data_dir: the folder of images, or the one that tensorflow-datasets prepared (default ~/tensorflow_datasets).
        image_size: the side of the square that every image is cropped and resampled to; None keeps the native size.
        channels: 1 (grey) or 3 (RGB); None keeps what the data set has.
        in_memory_bytes: a data set that takes no more than this is decoded once, here; a larger one on each reading.

    Raises:
        JaxdiffError: the data set, split or size is not to be had, or an image cannot be read.
    """
    if image_size is not None and image_size < 1:
        raise JaxdiffError(f"image_size must be a positive number of pixels or None, not {image_size}")
    if channels not in (None, 1, 3):
        raise JaxdiffError(f"channels must be 1 (grey), 3 (RGB) or None (as the data set has them), not {channels}")
    # Here and not above: each of them builds on this module, and only the one asked for should cost its imports.
    if name == "digits":
        from jaxdiff.data.digits import open_digits

        dataset = open_digits(split, image_size, channels)
    elif name == "digit_pairs":
        from jaxdiff.data.digit_pairs import open_digit_pairs

        if image_size or channels:
            raise JaxdiffError('the data set "digit_pairs" is 16x16 and grey: leave image_size and channels out')
        return open_digit_pairs(split)  # made as it is asked for: there is nothing to keep in memory
    elif name == "folder":
        from jaxdiff.data.folder import open_folder

        dataset = open_folder(data_dir, split, image_size, channels)
    else:
        from jaxdiff.data.tfds import open_tfds

        dataset = open_tfds(name, split, data_dir, image_size, channels)
    return in_memory(dataset, in_memory_bytes)


def from_pictures(
    pictures: Callable[[np.ndarray], Iterable[tuple[Image.Image, int]]],
    size: int,
    native_shape: tuple[int | None, int | None, int],
    class_names: tuple[str, ...],
    image_size: int | None,
    channels: int | None,
) -> ImageDataset:
    """Build a data set out of a function from indices [B] to B pairs of a picture and its label.

    `native_shape` is (H, W, C) of every picture; H and W may be None where they vary and an `image_size` is given.
    """
    height, width, native_channels = native_shape
    shape = (image_size or height, image_size or width, channels or native_channels)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        images = np.empty((len(indices), *shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        for row, (picture, label) in enumerate(pictures(np.asarray(indices))):
            images[row], labels[row] = to_array(picture, image_size, shape[2]), label
        return {"image": images, "label": labels}

    return ImageDataset(read, size, shape, class_names)


def in_memory(dataset: ImageDataset, max_bytes: int = 2 << 30, block: int = 256) -> ImageDataset:
    """Decode a data set once, `block` images at a time, in several threads if that helps; then answer from memory.

    A data set whose images take more than `max_bytes` is returned as it is. What an image that cannot be read raises,
    this raises.
    """
    n_bytes = dataset.size * math.prod(dataset.image_shape)
    if n_bytes > max_bytes:
        return dataset
    if dataset.size > 5000:  # some seconds, in which nothing else would be seen
        logger.info("decoding %d images into %.1f MB of memory", dataset.size, n_bytes / 1e6)
    held = {
        "image": np.empty((dataset.size, *dataset.image_shape), np.uint8),
        "label": np.empty(dataset.size, np.int32),
    } | ({"caption": np.empty(dataset.size, object)} if dataset.captions else {})

    def decode(start: int) -> None:
        rows = np.arange(start, min(start + block, dataset.size))
        for key, examples in dataset.read(rows).items():
            held[key][rows] = examples

    # Below a millisecond an image, decoding is mostly Python, and threads that queue for its lock only lose time.
    began = time.perf_counter()
    decode(0)
    is_slow = time.perf_counter() - began > 1e-3 * min(block, dataset.size)
    with ThreadPoolExecutor(None if is_slow else 1) as pool:
        for _ in pool.map(decode, range(block, dataset.size, block)):
            pass  # asking for each result is what raises the failure of its block
    return dataset._replace(read=lambda indices: {key: examples[indices] for key, examples in held.items()})


def precomputed(
    dataset: ImageDataset,
    function: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    block: int = 256,
    what: str = "preparing",
) -> ImageDataset:
    """Apply a function to all examples once, here, in batches of `block`; then answer from memory.

    The function sees batches of one size alone, the last filled up with examples from the start: compiled, it is
    compiled once. It treats each example by itself.
    """
    rows = np.arange(-(-dataset.size // block) * block) % dataset.size
    parts = []
    for begin in tqdm(range(0, len(rows), block), desc=what, unit="batch", disable=None):
        parts.append(function(dataset.read(rows[begin : begin + block])))
    held = {name: np.concatenate([part[name] for part in parts])[: dataset.size] for name in parts[0]}
    logger.info("%s %d examples took %.1f MB", what, dataset.size, sum(x.nbytes for x in held.values()) / 1e6)
    return dataset._replace(read=lambda indices: {name: examples[indices] for name, examples in held.items()})
