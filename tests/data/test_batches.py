"""Batches as a function of the step: order, epochs, shards, flips and reading ahead."""

import itertools
import threading
import time

import numpy as np
import pytest

from jaxdiff.data import ImageDataset, batches, open_dataset, prefetched
from jaxdiff.errors import JaxdiffError


def numbered(size, on_read=lambda indices: None):
    """Example i has the label i, and an image that is i on its left and 255 on its right."""

    def read(indices):
        on_read(indices)
        left = np.asarray(indices, np.uint8)[:, None, None, None]
        return {
            "image": np.concatenate([left, np.full_like(left, 255)], axis=2),
            "label": np.asarray(indices, np.int32),
        }

    return ImageDataset(read, size, (1, 2, 1), ())


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_shapes_and_types():
    batch = batches(open_dataset("digits"), 32)[3]
    assert (batch["image"].shape, batch["image"].dtype) == ((32, 8, 8, 1), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((32,), np.int32)


def test_images_keep_their_labels():
    digits = open_dataset("digits")
    everything = digits.read(np.arange(digits.size))
    of_label = {label: {x.tobytes() for x in everything["image"][everything["label"] == label]} for label in range(10)}
    batch = batches(digits, 64, seed=5)[7]
    assert all(x.tobytes() in of_label[label] for x, label in zip(batch["image"], batch["label"], strict=True))


@pytest.mark.parametrize("flip", [False, True])
def test_a_batch_depends_on_the_seed_and_the_step_alone(flip):
    dataset = numbered(50)
    forward = [batches(dataset, 8, seed=1, flip=flip)[k] for k in range(20)]
    again = batches(dataset, 8, seed=1, flip=flip)
    for k in np.random.default_rng(0).permutation(20):
        assert_same(again[int(k)], forward[k])
    other = batches(dataset, 8, seed=2, flip=flip)[0]
    assert not np.array_equal(other["label"], forward[0]["label"])


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 25])
def test_every_example_once_an_epoch(batch_size):
    ds = batches(numbered(10), batch_size)
    labels = np.concatenate([ds[k]["label"] for k in range(100 // batch_size)]).reshape(10, 10)
    np.testing.assert_array_equal(np.sort(labels), np.tile(np.arange(10), (10, 1)))
    assert len({tuple(epoch) for epoch in labels}) == 10  # each epoch in an order of its own


def test_every_place_of_an_epoch_is_as_likely():
    order = batches(numbered(5), 5)
    first = np.bincount([order[k]["label"][0] for k in range(2000)], minlength=5)
    assert (np.abs(first - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()


def test_without_shuffling_the_order_is_kept():
    ds = batches(numbered(5), 4, shuffle=False)
    assert [ds[k]["label"].tolist() for k in range(3)] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_shards_are_the_blocks_of_one_global_batch(shards, shuffle):
    dataset = numbered(10)
    options = {"seed": 3, "shuffle": shuffle, "flip": True}
    whole = batches(dataset, 8, **options)
    parts = [batches(dataset, 8, shard=(i, shards), **options) for i in range(shards)]
    for k in (0, 1, 7, 1000):
        blocks = [part[k] for part in parts]
        assert all(len(block["label"]) == 8 // shards for block in blocks)
        assert_same({key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}, whole[k])


def test_a_shard_reads_only_its_own_block():
    asked = []
    batches(numbered(10, asked.extend), 8, shuffle=False, shard=(1, 4))[0]
    assert asked == [2, 3]


def test_flips_mirror_about_half_of_the_images_and_nothing_else():
    dataset = numbered(200)
    plain, flipped = (batches(dataset, 100, flip=flip) for flip in (False, True))
    mirrored = []
    for k in range(20):
        a, b = plain[k], flipped[k]
        np.testing.assert_array_equal(a["label"], b["label"])
        is_mirrored = b["image"][:, 0, 0, 0] == 255
        np.testing.assert_array_equal(
            b["image"], np.where(is_mirrored[:, None, None, None], a["image"][:, :, ::-1], a["image"])
        )
        mirrored.append(is_mirrored)
    assert abs(np.mean(mirrored) - 0.5) < 5 * 0.5 / np.sqrt(2000)
    assert len({x.tobytes() for x in mirrored}) == 20  # drawn anew at every step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "shard": (0, 4)}, "batch_size must be a positive multiple of the number of shards, 4: 6"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": 4, "shard": (2, 2)}, r"shard must be \(i, n\) with 0 <= i < n, not \(2, 2\)"),
        ({"batch_size": 4, "seed": -1}, "seed must be 0 or more, not -1"),
    ],
)
def test_errors_say_what_is_allowed(options, message):
    with pytest.raises(JaxdiffError, match=message):
        batches(numbered(10), **options)


def test_prefetched_is_the_batches_in_order():
    ds = batches(numbered(10), 4)
    for k, batch in enumerate(itertools.islice(prefetched(ds, threads=3, ahead=5), 30)):
        assert_same(batch, ds[k])


def test_starting_at_a_step_continues_and_reads_nothing_before_it():
    ds = batches(numbered(10), 4, flip=True)
    continued = list(itertools.islice(prefetched(ds), 12, 20))
    for a, b in zip(continued, prefetched(ds, 12), strict=False):
        assert_same(a, b)

    asked = []
    far = prefetched(batches(numbered(10, asked.append), 4), 10**9, ahead=2)
    assert_same(next(far), batches(numbered(10), 4)[10**9])
    far.close()
    assert len(asked) <= 3


def test_a_failure_in_a_thread_reaches_the_loop_at_its_turn_and_ends_it():
    def fail(indices):
        if 7 in indices:
            raise JaxdiffError("the image x cannot be read")

    reader = prefetched(batches(numbered(10, fail), 1, shuffle=False), threads=4, ahead=8)
    assert [next(reader)["label"][0] for _ in range(7)] == list(range(7))
    with pytest.raises(JaxdiffError, match="the image x"):
        next(reader)
    with pytest.raises(StopIteration):
        next(reader)


def test_closing_stops_the_threads():
    def readers():
        return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}

    before = readers()
    reader = prefetched(batches(numbered(10), 4), threads=3)
    next(reader)
    started = readers() - before
    assert started
    reader.close()
    deadline = time.monotonic() + 5
    while started & readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not started & readers()
