"""What images are compared by: functions from images to features, over all devices, and a cache of them on disk."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxdiff.data import ImageDataset
from jaxdiff.devices import fetch, over_devices, put
from jaxdiff.errors import JaxdiffError
from jaxdiff.hosts import all_agree, is_leader
from jaxdiff.images import save_arrays, to_float
from jaxdiff.models.classifier import judge, load_classifier
from jaxdiff.models.inception import Inception, inception_input, load_inception

logger = logging.getLogger("jaxdiff")


class Extractor(NamedTuple):
    """A function from images to features; any of one's own does: Extractor("name", lambda params, images: ...).

    name: tells it from others, in results and in the cache. apply: (params, uint8 [B, H, W, C]) -> [B, F], pure.
    image_shape: the one (H, W, C) that it takes, or None.
    """

    name: str
    apply: Callable[[Any, UInt8[Array, "B H W C"]], Float[Array, "B F"]]
    params: Any = ()
    image_shape: tuple[int, int, int] | None = None


PIXELS = Extractor("pixels", lambda params, images: to_float(images).reshape(len(images), -1))
"""The images themselves, in [-1, 1]."""


def classifier_features(path: str | Path) -> Extractor:
    """The features by which a classifier that `benchmarks/classifier.py` trained tells classes apart.

    Raises JaxdiffError where there is none at `path`.
    """
    classifier = load_classifier(path)
    apply = lambda params, images: judge(classifier.model, params, to_float(images)).features  # noqa: E731
    return Extractor("classifier", apply, classifier.params, classifier.image_shape)


def inception_features(path: str | Path) -> Extractor:
    """The 2,048 features of the FID's Inception, of images of any size in grey or colour.

    Raises JaxdiffError where its weights are not at `path`, with where they come from.
    """
    apply = lambda params, images: Inception().apply(params, inception_input(to_float(images)))  # noqa: E731
    return Extractor("inception", apply, load_inception(path))


def extract(
    extractor: Extractor, batches: Iterable[UInt8[np.ndarray, "B H W C"]], batch_size: int = 256
) -> Float[np.ndarray, "N F"]:
    """The features of images that come in batches of any size, float32, in their order.

    One compiled program over all devices, batch_size images at a time; of the images no more than that is held.
    Raises JaxdiffError for images that are not uint8 [B, H, W, C], of a shape that the extractor does not take, and for
    none.
    """
    split, whole = over_devices()
    batch_size = -(-batch_size // jax.device_count()) * jax.device_count()
    apply, params = jax.jit(extractor.apply), put(extractor.params, whole)

    def features(images: np.ndarray) -> np.ndarray:
        rows = np.minimum(np.arange(batch_size), len(images) - 1)  # a last batch of the same size, for one compilation
        return fetch(apply(params, put(images[rows], split))).astype(np.float32)[: len(images)]

    found, waiting = [], None
    for images in batches:
        _check(extractor, images)
        waiting = images if waiting is None else np.concatenate([waiting, images])
        while len(waiting) >= batch_size:
            found.append(features(waiting[:batch_size]))
            waiting = waiting[batch_size:]
    if waiting is None:
        raise JaxdiffError("There are no images to take features of.")
    return np.concatenate([*found, features(waiting)] if len(waiting) else found)


def _check(extractor: Extractor, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4:
        raise JaxdiffError(
            f"Features are of images uint8 [B, H, W, C], 0 to 255, not of {images.dtype} {list(images.shape)}: bring "
            "those in [-1, 1] there by jaxdiff.images.to_uint8."
        )
    if extractor.image_shape not in (None, images.shape[1:]):
        raise JaxdiffError(
            f"{extractor.name} takes images of {extractor.image_shape}, and these are of {images.shape[1:]}."
        )


def dataset_features(
    extractor: Extractor,
    dataset: ImageDataset,
    source: dict[str, Any],
    folder: str | Path,
    num: int | None = None,
    batch_size: int = 256,
) -> Float[np.ndarray, "N F"]:
    """The features of a data set's first `num` images, or of all; read from `folder` where it has them.

    source: what tells the data set from others, such as its name and split: JSON's values. With it, the shapes, and the
    extractor's name and parameters a file is named, which also holds that key in words.
    Raises JaxdiffError for a file that is damaged, and what `extract` raises.
    """
    num = min(num or dataset.size, dataset.size)
    sums = [crc32(np.ascontiguousarray(leaf)) for leaf in jax.tree.leaves(extractor.params)]
    shape = list(dataset.image_shape)
    key = json.dumps(source | {"shape": shape, "num": num, "features": extractor.name, "params": sums}, sort_keys=True)
    path = Path(folder) / f"{extractor.name}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if all_agree(path.is_file()):
        try:
            with np.load(path) as content:
                found = {name: content[name] for name in ("features", "key")}
        except Exception as error:  # whatever a damaged file raises in zipfile, NumPy or above
            raise JaxdiffError(f"The features in {path} are damaged ({error}): delete the file.") from error
        if found["key"] != key:
            raise JaxdiffError(f"{path} holds features of something else: delete the file.")
        return found["features"]
    logger.info("features %s of %d images, for %s", extractor.name, num, path)
    batches = (dataset.read(np.arange(i, min(i + batch_size, num)))["image"] for i in range(0, num, batch_size))
    features = extract(extractor, batches, batch_size)
    if is_leader():
        save_arrays(path, features=features, key=key)
    return features
