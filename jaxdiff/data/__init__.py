"""Images in: data sets by name, and batches of them as a pure function of the step."""

from jaxdiff.data.batches import Batch, batches, prefetched
from jaxdiff.data.dataset import ImageDataset, in_memory, open_dataset

__all__ = ["Batch", "ImageDataset", "batches", "in_memory", "open_dataset", "prefetched"]
