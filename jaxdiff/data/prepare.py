"""Download a data set and prepare it for reading without TensorFlow: python -m jaxdiff.data.prepare NAME."""

import importlib.util
import os
import sys

import tyro

from jaxdiff.data.tfds import require_known
from jaxdiff.errors import JaxdiffError


def prepare(name: tyro.conf.Positional[str], data_dir: str | None = None, manual_dir: str | None = None) -> None:
    """Download a data set of tensorflow-datasets and prepare it in the array_record format, which jaxdiff reads.

    This needs TensorFlow (`pip install -e ".[tfds]"`); reading what it prepared does not.

    Args:
        name: The data set, such as "mnist", "cifar10" or "emnist/letters".
        data_dir: Where to put it; the default is ~/tensorflow_datasets.
        manual_dir: A folder with the original files, for a machine without a network.

    Raises:
        JaxdiffError: TensorFlow is missing, there is no such data set, it is already there in another format, or it
            cannot be downloaded.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise JaxdiffError('preparing a data set needs TensorFlow: run `pip install -e ".[tfds]"` first')
    if manual_dir is not None and not os.path.isdir(os.path.expanduser(manual_dir)):
        raise JaxdiffError(
            f"there is no folder {manual_dir}: give the one that holds the original files as --manual-dir"
        )
    import requests
    import tensorflow_datasets as tfds

    require_known(name, data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (AssertionError, ValueError) as error:  # no such version, no such configuration
        raise JaxdiffError(f"tensorflow-datasets cannot prepare {name}: {error}") from error
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config, file_format="array_record")
    except (requests.RequestException, tfds.download.DownloadError) as error:
        raise JaxdiffError(
            f"the download failed ({error}): try again, or fetch these files by other means and give their folder as "
            f"--manual-dir: {' '.join(builder.url_infos)}"
        ) from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise JaxdiffError(
            f"{builder.data_dir} already holds the data set as {' and '.join(sorted(formats))}: give another "
            "--data-dir, or remove that folder first"
        )
    splits = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    print(f"{builder.info.full_name} is prepared in {builder.data_dir}: {splits}")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # or TensorFlow reports at length on the machine
    try:
        tyro.cli(prepare)
    except JaxdiffError as error:
        sys.exit(f"error: {error}")
