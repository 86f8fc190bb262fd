"""The data sets of tensorflow-datasets, once prepared on disk: found and read without TensorFlow."""

import difflib
import io
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from jaxdiff.data.dataset import ImageDataset, from_pictures
from jaxdiff.errors import JaxdiffError


def open_tfds(
    name: str,
    split: str = "train",
    data_dir: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
) -> ImageDataset:
    """Open a data set that tensorflow-datasets has prepared in its array_record format.

    `name` may carry a configuration and a version ("emnist/letters", "mnist:3.0.1"; else the newest that is there), and
    `split` any expression of tensorflow-datasets ("test", "train[:1000]"). Images and labels are the features that the
    data set is supervised by, or else its first image and its first class label; without one there are no classes.

    Raises:
        JaxdiffError: there is no such data set or split, it is not prepared or in another format, or it has no images
            of 8 or 16 bits; or sizes vary and no `image_size` is given.
    """
    import tensorflow_datasets as tfds  # two seconds of imports that other data sets need not pay
    from tensorflow_datasets.proto import tf_example_pb2

    builder = _prepared_builder(name, data_dir and os.path.expanduser(data_dir))
    info = builder.info
    image_key = _feature_key(info, lambda f: isinstance(f, tfds.features.Image) and f.np_dtype in (np.uint8, np.uint16))
    label_key = _feature_key(info, lambda f: isinstance(f, tfds.features.ClassLabel))
    if image_key is None:
        raise JaxdiffError(
            f'the data set "{name}" has no images of 8 or 16 bits: choose one that has, for of this one the features '
            f"are {', '.join(info.features)}"
        )
    try:
        info.splits[split]
    except ValueError as error:
        raise JaxdiffError(
            f'the data set "{name}" has no split "{split}": choose one of {", ".join(info.splits)}, or a part of one '
            'such as "train[:1000]"'
        ) from error
    source = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format="array_record"
    )

    height, width, native_channels = info.features[image_key].shape
    if image_size is None and None in (height, width):
        raise JaxdiffError(f'the images of "{name}" vary in size: set image_size to have all cropped and resized to it')

    def pictures(indices: np.ndarray) -> Iterator[tuple[Image.Image, int]]:
        # All records of a batch in one call, which is thirty times faster than one by one, and of each record only the
        # two features wanted, as they are stored: decoding all of it through tensorflow-datasets takes twice as long.
        for record in source.__getitems__(indices.tolist()):
            stored = tf_example_pb2.Example.FromString(record).features.feature
            label = 0 if label_key is None else stored[label_key].int64_list.value[0]
            yield Image.open(io.BytesIO(stored[image_key].bytes_list.value[0])), label

    return from_pictures(
        pictures,
        size=len(source),
        native_shape=(height, width, 1 if native_channels == 1 else 3),
        class_names=() if label_key is None else tuple(info.features[label_key].names),
        image_size=image_size,
        channels=channels,
    )


def require_known(name: str, data_dir: str | None) -> None:
    """Raise JaxdiffError, with the names that are nearest to it, unless tensorflow-datasets has a data set `name`."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if (parts := re.fullmatch(r"(\w+)(/[\w.-]+)?(:[\d.*]+)?", name)) and parts[1] in known:
        return
    near = difflib.get_close_matches(name.lower(), ["digits", "folder", *known])
    raise JaxdiffError(
        f'there is no data set "{name}", in tensorflow-datasets or prepared in {_where(data_dir)}: '
        + (f"did you mean {' or '.join(near)}?" if near else 'take "digits", "folder" or a name from its catalogue')
    )


def _prepared_builder(name: str, data_dir: str | None) -> Any:
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    how = f'`pip install -e ".[tfds]"` and then `python -m jaxdiff.data.prepare {name} --data-dir'
    try:
        # Not tfds.builder: that asks the network about what is not on disk, and wants the version of today's code.
        builder = builder_from_files(name, data_dir=data_dir)
    except ValueError as error:  # a malformed name, or DatasetNotFoundError, which is one too
        require_known(name, data_dir)
        raise JaxdiffError(
            f'the data set "{name}" is not prepared in {_where(data_dir)}: run {how} {_where(data_dir)}`'
        ) from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise JaxdiffError(
            f'the data set "{name}" is prepared in {_where(data_dir)} as {" and ".join(sorted(formats))}, which only '
            f"TensorFlow reads at random: run {how} ANOTHER_FOLDER`, and set data_dir to that folder"
        )
    return builder


def _where(data_dir: str | None) -> str:
    from tensorflow_datasets.core import constants

    return data_dir or constants.DATA_DIR


def _feature_key(info: Any, matches: Callable[[Any], bool]) -> str | None:
    """Find the feature that the data set is supervised by, or else the first, for which `matches` holds."""
    supervised = [key for key in info.supervised_keys or () if key in info.features]
    return next((key for key in [*supervised, *info.features] if matches(info.features[key])), None)
