"""The handwritten digits that scikit-learn carries: 1797 grey images of 8x8, here without any download."""

import numpy as np
from PIL import Image

from jaxdiff.data.dataset import ImageDataset, from_pictures
from jaxdiff.errors import JaxdiffError

_SPLITS = {"train": slice(0, 1500), "test": slice(1500, None), "all": slice(None)}


def open_digits(split: str = "train", image_size: int | None = None, channels: int | None = None) -> ImageDataset:
    """Open the digits: split "train" is the first 1500, "test" the last 297, "all" every one.

    The 17 grey levels 0 ... 16 become round(level * 255 / 16).
    """
    if split not in _SPLITS:
        raise JaxdiffError(f'the data set "digits" has no split "{split}": choose one of {", ".join(_SPLITS)}')
    from sklearn.datasets import load_digits  # a second of imports that other data sets need not pay

    digits = load_digits()
    images = np.rint(digits.images[_SPLITS[split]] * (255 / 16)).astype(np.uint8)
    labels = digits.target[_SPLITS[split]]
    return from_pictures(
        lambda indices: ((Image.fromarray(images[i]), labels[i]) for i in indices),
        size=len(images),
        native_shape=(8, 8, 1),
        class_names=tuple("0123456789"),
        image_size=image_size,
        channels=channels,
    )
