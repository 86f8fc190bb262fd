"""Opening data sets by name, and holding them in memory."""

import logging
import threading

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data import ImageDataset, in_memory, open_dataset
from jaxdiff.data.dataset import from_pictures
from jaxdiff.errors import JaxdiffError


def grey_levels(size, shape=(2, 3, 1), on_read=lambda indices: None):
    """Example i is an image of the constant i, with the label -i."""

    def read(indices):
        on_read(indices)
        pixels = np.asarray(indices, np.uint8)[:, None, None, None]
        return {"image": np.broadcast_to(pixels, (len(indices), *shape)), "label": -np.asarray(indices, np.int32)}

    return ImageDataset(read, size, shape, ())


@pytest.mark.parametrize("block", [3, 10, 100])
def test_in_memory_reads_every_example_once(block):
    asked = []
    dataset = grey_levels(10, on_read=asked.extend)
    held = in_memory(dataset, block=block)
    assert sorted(asked) == list(range(10))
    indices = np.array([7, 0, 7, 9])
    for key, value in dataset.read(indices).items():
        np.testing.assert_array_equal(held.read(indices)[key], value)
    assert len(asked) == 14  # the four of the line above, and none through `held`
    assert held.image_shape == dataset.image_shape


def test_what_is_read_from_memory_may_be_written_to():
    held = in_memory(grey_levels(3))
    held.read(np.arange(3))["image"][:] = 99
    assert held.read(np.arange(3))["image"].max() == 2


def test_in_memory_leaves_a_larger_data_set_on_disk():
    dataset = grey_levels(10)
    assert in_memory(dataset, max_bytes=59) is dataset
    assert in_memory(dataset, max_bytes=60) is not dataset


def test_in_memory_says_so_in_one_line_where_it_takes_a_while(caplog):
    with caplog.at_level(logging.INFO, "jaxdiff"):
        in_memory(grey_levels(10))
        in_memory(grey_levels(20_000))
    assert caplog.messages == ["decoding 20000 images into 0.1 MB of memory"]


@pytest.mark.parametrize("bad", [0, 5, 9])
def test_in_memory_passes_failures_on(bad):
    def fail(indices):
        if bad in indices:
            raise JaxdiffError("the image x cannot be read")

    with pytest.raises(JaxdiffError, match="the image x"):
        in_memory(grey_levels(10, on_read=fail), block=2)


def test_slow_images_are_decoded_in_several_threads():
    together = threading.Barrier(2, timeout=5)  # is passed only by two threads at once

    def wait(indices):
        threading.Event().wait(0.01) if 0 in indices else together.wait()

    in_memory(grey_levels(3, on_read=wait), block=1)


def test_from_pictures_takes_the_size_and_channels_asked_for():
    pictures = [Image.new("RGB", (4 + i, 9), (i, i, i)) for i in range(3)]
    dataset = from_pictures(lambda indices: ((pictures[i], i) for i in indices), 3, (None, None, 3), ("a",), 4, 1)
    assert dataset.image_shape == (4, 4, 1)
    examples = dataset.read(np.array([2, 1]))
    assert examples["image"].shape == (2, 4, 4, 1)
    assert examples["image"].dtype == np.uint8
    assert examples["label"].dtype == np.int32
    np.testing.assert_array_equal(examples["image"][:, 0, 0, 0], [2, 1])
    np.testing.assert_array_equal(examples["label"], [2, 1])
    assert dataset.read(np.array([], int))["image"].shape == (0, 4, 4, 1)


def test_open_dataset_in_and_out_of_memory_agree(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(tmp_path / f"{i}.png")
    kept, read = (open_dataset("folder", data_dir=str(tmp_path), in_memory_bytes=n) for n in (1 << 20, 0))
    (tmp_path / "3.png").unlink()
    np.testing.assert_array_equal(kept.read(np.arange(3))["image"], read.read(np.arange(3))["image"])
    assert kept.read(np.array([3]))["image"].shape == (1, 6, 6, 3)
    with pytest.raises(JaxdiffError, match=r"3\.png cannot be read"):
        read.read(np.array([3]))


def test_errors_say_what_is_allowed():
    with pytest.raises(JaxdiffError, match=r"channels must be 1 .* 3 .* None .*, not 2"):
        open_dataset("digits", channels=2)
    with pytest.raises(JaxdiffError, match="image_size must be a positive number of pixels or None, not 0"):
        open_dataset("digits", image_size=0)
