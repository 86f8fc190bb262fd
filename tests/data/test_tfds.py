"""Reading prepared data sets of tensorflow-datasets without TensorFlow."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.core import constants
from tensorflow_datasets.proto import tf_example_pb2

from jaxdiff.data import open_dataset
from jaxdiff.errors import JaxdiffError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tfds"
RNG = np.random.default_rng(0)


def feature_json(kind, **fields):
    module = {"Image": "image_feature", "ClassLabel": "class_label_feature", "Scalar": "scalar"}[kind]
    return {"pythonClassName": f"tensorflow_datasets.core.features.{module}.{kind}", **fields}


def image_json(*shape, dtype="uint8"):
    return feature_json("Image", image={"dtype": dtype, "shape": {"dimensions": [str(n) for n in shape]}})


def label_json(n):
    return feature_json("ClassLabel", classLabel={"numClasses": str(n)})


def write_prepared(root, name, features, splits, supervised=(), file_format="array_record"):
    """Write what download_and_prepare would: `splits` maps a name to a list of {feature: array or int}."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    infos = []
    for split, examples in splits.items():
        writer = ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1")
        for example in examples:
            record = tf_example_pb2.Example()
            for key, value in example.items():
                if isinstance(value, int):
                    record.features.feature[key].int64_list.value.append(value)
                else:
                    Image.fromarray(value.squeeze()).save(png := io.BytesIO(), "png")
                    record.features.feature[key].bytes_list.value.append(png.getvalue())
            writer.write(record.SerializeToString())
        writer.close()
        infos.append(
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(len(examples))],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": "1.0.0", "fileFormat": file_format, "splits": infos}
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    class_name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    (folder / "features.json").write_text(
        json.dumps({"pythonClassName": class_name, "featuresDict": {"features": features}})
    )


def pixels(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


@pytest.fixture
def tiny(tmp_path):
    """A prepared data set with more than one image and label feature; gives its folder and its images."""
    images = [pixels(6, 5, 3) for _ in range(7)]
    examples = [{"aaa": pixels(6, 5, 1), "image": x, "kind": 2 - i % 3, "label": i % 3} for i, x in enumerate(images)]
    features = {"aaa": image_json(6, 5, 1), "image": image_json(6, 5, 3), "kind": label_json(4), "label": label_json(3)}
    splits = {"train": examples[:5], "test": examples[5:]}
    write_prepared(tmp_path, "tiny", features, splits, supervised=("image", "label"))
    return str(tmp_path), np.stack(images)


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_reads_the_supervised_features(tiny, in_memory_bytes):
    data_dir, images = tiny
    dataset = open_dataset("tiny", data_dir=data_dir, in_memory_bytes=in_memory_bytes)
    assert (dataset.size, dataset.image_shape, dataset.class_names) == (5, (6, 5, 3), ("0", "1", "2"))
    indices = np.array([4, 0, 4])
    examples = dataset.read(indices)
    np.testing.assert_array_equal(examples["image"], images[indices])
    np.testing.assert_array_equal(examples["label"], indices % 3)


def test_splits_and_parts_of_them(tiny):
    data_dir, images = tiny
    for split, part in {"test": images[5:], "train[1:3]": images[1:3], "train+test": images}.items():
        dataset = open_dataset("tiny:1.0.0", split, data_dir=data_dir)
        np.testing.assert_array_equal(dataset.read(np.arange(dataset.size))["image"], part)


def test_the_default_folder_is_that_of_tensorflow_datasets(tiny, monkeypatch):
    monkeypatch.setattr(constants, "DATA_DIR", tiny[0])
    assert open_dataset("tiny").size == 5


def test_a_tilde_is_the_home_folder(tiny, monkeypatch):
    monkeypatch.setenv("HOME", tiny[0])
    assert open_dataset("tiny", data_dir="~").size == 5


def test_without_a_class_label_there_are_no_classes(tmp_path):
    image = pixels(4, 4, 1)
    write_prepared(tmp_path, "plain", {"picture": image_json(4, 4, 1)}, {"train": [{"picture": image}] * 2})
    dataset = open_dataset("plain", data_dir=str(tmp_path))
    assert dataset.class_names == ()
    examples = dataset.read(np.arange(2))
    np.testing.assert_array_equal(examples["label"], [0, 0])
    np.testing.assert_array_equal(examples["image"], [image, image])


def test_images_of_many_sizes_need_an_image_size(tmp_path):
    examples = [{"image": pixels(4, 6, 3)}, {"image": pixels(5, 4, 3)}]
    write_prepared(tmp_path, "mixed", {"image": image_json(-1, -1, 3)}, {"train": examples})
    with pytest.raises(JaxdiffError, match='images of "mixed" vary in size: set image_size'):
        open_dataset("mixed", data_dir=str(tmp_path))
    dataset = open_dataset("mixed", data_dir=str(tmp_path), image_size=4)
    np.testing.assert_array_equal(dataset.read(np.array([0]))["image"][0], examples[0]["image"][:, 1:5])


@pytest.mark.parametrize("feature", [label_json(3), image_json(2, 2, 1, dtype="float32")])
def test_a_data_set_without_images_is_refused(tmp_path, feature):
    write_prepared(tmp_path, "words", {"word": feature}, {"train": [{"word": 1}]})
    with pytest.raises(JaxdiffError, match=r'"words" has no images of 8 or 16 bits: .* features are word'):
        open_dataset("words", data_dir=str(tmp_path))


def test_an_unknown_split_lists_them(tiny):
    for split in ("valid", "train[", "train[9:]"):
        with pytest.raises(JaxdiffError, match=r"no split .*: choose one of train, test, or a part"):
            open_dataset("tiny", split, data_dir=tiny[0])


def test_an_unknown_name_suggests_near_ones(tmp_path):
    with pytest.raises(JaxdiffError, match=r'no data set "fashion-mnist".*: did you mean fashion_mnist\?$'):
        open_dataset("fashion-mnist", data_dir=str(tmp_path))
    with pytest.raises(JaxdiffError, match=r'no data set "digit".*: did you mean digits\?$'):
        open_dataset("digit", data_dir=str(tmp_path))
    with pytest.raises(JaxdiffError, match=r'no data set "q9q9q9".*: take "digits", "folder" or a name'):
        open_dataset("q9q9q9", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "mnist:3.0.1", "emnist/letters"])
def test_what_is_not_prepared_names_the_command(tmp_path, name):
    command = f'run `pip install -e ".[tfds]"` and then `python -m jaxdiff.data.prepare {name} --data-dir {tmp_path}`'
    with pytest.raises(JaxdiffError) as error:
        open_dataset(name, data_dir=str(tmp_path))
    assert str(error.value) == f'the data set "{name}" is not prepared in {tmp_path}: {command}'


def test_another_file_format_names_the_command(tmp_path):
    write_prepared(tmp_path, "tiny", {"image": image_json(2, 2, 1)}, {"train": []}, file_format="tfrecord")
    with pytest.raises(
        JaxdiffError, match=r"prepared in .* as tfrecord, .*data\.prepare tiny --data-dir ANOTHER_FOLDER"
    ):
        open_dataset("tiny", data_dir=str(tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the prepared data set in {SHARED}")
def test_reads_fashion_mnist_as_tensorflow_datasets_does():
    import tensorflow_datasets as tfds

    dataset = open_dataset("fashion_mnist", "test", data_dir=str(SHARED), in_memory_bytes=0)
    assert (dataset.size, dataset.image_shape) == (10_000, (28, 28, 1))
    assert dataset.class_names[9] == "Ankle boot"
    source = tfds.builder("fashion_mnist", data_dir=SHARED).as_data_source("test")
    indices = np.array([0, 9_999, 123])
    examples = dataset.read(indices)
    for row, i in enumerate(indices.tolist()):
        np.testing.assert_array_equal(examples["image"][row], source[i]["image"])
        assert examples["label"][row] == source[i]["label"]
