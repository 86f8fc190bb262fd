"""Batches as a pure function of the step: shuffled, flipped and sharded without any state to save."""

import sys
from collections.abc import Iterator
from functools import lru_cache

import grain
import numpy as np

from jaxdiff.data.dataset import ImageDataset
from jaxdiff.errors import JaxdiffError

Batch = dict[str, np.ndarray]


def batches(
    dataset: ImageDataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    flip: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> grain.MapDataset:
    """Make an endless sequence of batches whose k-th element depends on nothing but the arguments and k.

    Epochs follow each other without a gap, so that a batch may span two or more: each holds every example exactly once,
    in an order of its own if `shuffle`. With `flip`, each image is mirrored left to right with probability 1/2.

    Args:
        dataset: the examples.
        batch_size: of the global batch, over all shards.
        seed: of the order and the flips, at least 0.
        shuffle: False keeps the order of the data set.
        flip: whether to mirror images at random.
        shard: (i, n) reads the i-th of n contiguous blocks of each global batch, which is the same for every n.

    Returns:
        A grain.MapDataset whose element k is {"image": uint8 [B, H, W, C], "label": int32 [B]}, B = batch_size / n.

    Raises:
        JaxdiffError: the batch size is not a positive multiple of n, or the shard or the seed is out of range.
    """
    shard_index, shard_count = shard
    if not 0 <= shard_index < shard_count:
        raise JaxdiffError(f"shard must be (i, n) with 0 <= i < n, not {shard}")
    if batch_size < 1 or batch_size % shard_count:
        raise JaxdiffError(
            f"batch_size must be a positive multiple of the number of shards, {shard_count}: {batch_size} is not"
        )
    if seed < 0:
        raise JaxdiffError(f"seed must be 0 or more, not {seed}")
    block_size = batch_size // shard_count
    block = slice(shard_index * block_size, (shard_index + 1) * block_size)

    # The order of an epoch is drawn whole: grain's own shuffle takes 12 us an example, and milliseconds in a data set
    # of less than a hundred. Two epochs are kept because some threads are in the next while others finish this one.
    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, 0, epoch)).permutation(dataset.size)

    def read(step: int) -> Batch:
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, indices = np.divmod(places, dataset.size)
        if shuffle:
            for epoch in np.unique(epochs):
                indices[epochs == epoch] = epoch_order(int(epoch))[indices[epochs == epoch]]
        batch = dataset.read(indices[block])
        if flip:
            mirrored = np.random.default_rng((seed, 1, step)).random(batch_size)[block] < 0.5
            images = batch["image"]
            batch["image"] = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        return batch

    return grain.MapDataset.range(sys.maxsize).map(read)


def prefetched(batches: grain.MapDataset, start: int = 0, *, threads: int = 4, ahead: int = 4) -> Iterator[Batch]:
    """Iterate over batches[start], batches[start + 1], ..., in order, reading `ahead` of them in threads meanwhile.

    Starting anywhere costs the same. What reading a batch raises, is raised at its turn and ends the iteration. Leaving
    the loop, or `close()`, stops the threads.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    reader = iter(batches[start:].to_iter_dataset(options))
    try:
        yield from reader
    finally:
        reader.close()
