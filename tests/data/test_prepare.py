"""Preparing a data set: with TensorFlow where it is installed, and the one sentence where it is not."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jaxdiff.data import open_dataset
from jaxdiff.data.prepare import prepare
from jaxdiff.errors import JaxdiffError

HAS_TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
RAW = Path(__file__).parents[3] / "shared" / "data" / "fashion_mnist_raw"
needs_tensorflow = pytest.mark.skipif(not HAS_TENSORFLOW, reason="preparing a data set needs TensorFlow")


@pytest.mark.skipif(HAS_TENSORFLOW, reason="TensorFlow is installed")
def test_without_tensorflow_it_says_what_to_install(tmp_path):
    with pytest.raises(JaxdiffError, match=r'needs TensorFlow: run `pip install -e "\.\[tfds\]"` first'):
        prepare("mnist", str(tmp_path))


@needs_tensorflow
def test_unknown_names_and_versions(tmp_path):
    with pytest.raises(JaxdiffError, match="did you mean fashion_mnist"):
        prepare("fashion-mnist", str(tmp_path))
    with pytest.raises(JaxdiffError, match=r"cannot be loaded at version 1\.0\.0, only: 3\.0\.1"):
        prepare("fashion_mnist:1.0.0", str(tmp_path))


@needs_tensorflow
def test_a_missing_manual_folder(tmp_path):
    with pytest.raises(JaxdiffError, match=r"there is no folder .*absent: give the one"):
        prepare("mnist", str(tmp_path), str(tmp_path / "absent"))


@needs_tensorflow
@pytest.mark.slow
@pytest.mark.skipif(not RAW.is_dir(), reason=f"needs the original files in {RAW}")
def test_prepares_from_the_original_files(tmp_path, capsys):
    prepare("fashion_mnist", str(tmp_path), str(RAW))
    assert capsys.readouterr().out.endswith(f"prepared in {tmp_path}/fashion_mnist/3.0.1: train 60000, test 10000\n")
    dataset = open_dataset("fashion_mnist", "test", data_dir=str(tmp_path))
    np.testing.assert_array_equal(np.bincount(dataset.read(np.arange(10_000))["label"]), [1000] * 10)

    info = tmp_path / "fashion_mnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(JaxdiffError, match="already holds the data set as tfrecord: give another --data-dir"):
        prepare("fashion_mnist", str(tmp_path), str(RAW))
