"""Folders of images: classes, splits and what is wrong with them."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data import open_dataset
from jaxdiff.data.folder import open_folder
from jaxdiff.errors import JaxdiffError


def put(file, value=0, size=(4, 4), mode="L"):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(file)
    return file


def contents(dataset):
    """The (grey level, label) of every example."""
    examples = dataset.read(np.arange(dataset.size))
    return list(zip(examples["image"][:, 0, 0, 0].tolist(), examples["label"].tolist(), strict=True))


def test_sub_folders_are_classes_in_order_of_name(tmp_path):
    put(tmp_path / "dog" / "b.png", 3)
    put(tmp_path / "dog" / "a.BMP", 2)
    put(tmp_path / "cat" / "deep" / "down" / "x.png", 1)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    put(tmp_path / "dog" / ".cache" / "a.png", 9)
    put(tmp_path / ".hidden" / "a.png", 9)
    put(tmp_path / "cat" / "._x.png", 9)
    dataset = open_folder(str(tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert contents(dataset) == [(1, 0), (2, 1), (3, 1)]


def test_without_sub_folders_there_are_no_classes(tmp_path):
    put(tmp_path / "b.png", 2)
    put(tmp_path / "a.webp", 1, mode="RGB")
    dataset = open_folder(str(tmp_path), channels=1)
    assert dataset.class_names == ()
    assert [label for _, label in contents(dataset)] == [0, 0]


def test_train_and_test_are_splits_with_one_numbering(tmp_path):
    put(tmp_path / "train" / "a" / "1.png", 1)
    put(tmp_path / "train" / "c" / "2.png", 2)
    put(tmp_path / "test" / "b" / "3.png", 3)
    put(tmp_path / "test" / "c" / "4.png", 4)
    train, test = open_folder(str(tmp_path)), open_folder(str(tmp_path), "test")
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert contents(train) == [(1, 0), (2, 2)]
    assert contents(test) == [(3, 1), (4, 2)]


def test_train_beside_other_folders_is_a_class(tmp_path):
    put(tmp_path / "train" / "1.png")
    put(tmp_path / "tram" / "2.png")
    assert open_folder(str(tmp_path)).class_names == ("train", "tram")


def test_an_empty_class_keeps_its_number_and_is_warned_of(tmp_path, caplog):
    put(tmp_path / "b" / "1.png", 7)
    (tmp_path / "a").mkdir()
    with caplog.at_level(logging.WARNING, "jaxdiff"):
        dataset = open_folder(str(tmp_path))
    assert dataset.class_names == ("a", "b")
    assert contents(dataset) == [(7, 1)]
    assert caplog.messages == [f"the class a has no images in {tmp_path}"]


@pytest.mark.parametrize(("modes", "channels"), [(("L", "1", "I;16"), 1), (("L", "RGB"), 3), (("P",), 3)])
def test_channels_are_3_unless_all_is_grey(tmp_path, modes, channels):
    for mode in modes:
        put(tmp_path / f"{mode.replace(';', '')}.png", mode=mode)
    assert open_folder(str(tmp_path)).image_shape == (4, 4, channels)


def test_sizes_that_differ_need_an_image_size(tmp_path):
    put(tmp_path / "a.png", size=(5, 4))
    put(tmp_path / "b.png", size=(5, 4))
    put(tmp_path / "c.png", size=(6, 4))
    put(tmp_path / "d.png", size=(7, 4))
    with pytest.raises(JaxdiffError, match=r"one size: .*c\.png is 6x4 and .*a\.png is 5x4; set image_size"):
        open_folder(str(tmp_path))
    dataset = open_folder(str(tmp_path), image_size=8)
    assert dataset.read(np.arange(4))["image"].shape == (4, 8, 8, 1)
    (tmp_path / "c.png").unlink()
    (tmp_path / "d.png").unlink()
    assert open_folder(str(tmp_path)).image_shape == (4, 5, 1)


def test_errors_name_the_folder_and_the_remedy(tmp_path):
    with pytest.raises(JaxdiffError, match='"folder" needs data_dir'):
        open_folder(None)
    with pytest.raises(JaxdiffError, match=r"there is no folder .*absent: set data_dir"):
        open_folder(str(tmp_path / "absent"))
    with pytest.raises(JaxdiffError, match=r"holds no images: put some into it \(\.png, \.jpg"):
        open_folder(str(tmp_path))
    put(tmp_path / "a" / "1.png")
    with pytest.raises(JaxdiffError, match=r'has no test split, only train: .* sub-folders "train" and "test"'):
        open_folder(str(tmp_path), "test")
    put(tmp_path / "2.png")
    with pytest.raises(JaxdiffError, match=r"2\.png lies beside sub-folders: move it"):
        open_folder(str(tmp_path))


def test_an_image_outside_the_splits_is_an_error(tmp_path):
    put(tmp_path / "train" / "1.png")
    put(tmp_path / "2.png")
    with pytest.raises(JaxdiffError, match=r"2\.png lies beside sub-folders"):
        open_folder(str(tmp_path))


def test_a_missing_train_split_is_an_error(tmp_path):
    put(tmp_path / "test" / "1.png")
    with pytest.raises(JaxdiffError, match="has no train split, only test"):
        open_folder(str(tmp_path))


def test_a_broken_image_is_named(tmp_path):
    put(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    dataset = open_folder(str(tmp_path), image_size=4, channels=1)  # nothing needs to be known of the files yet
    with pytest.raises(JaxdiffError, match=r"the image .*b\.png cannot be read"):
        dataset.read(np.array([0, 1]))
    with pytest.raises(JaxdiffError, match=r"the image .*b\.png cannot be read"):
        open_folder(str(tmp_path))


def captions_of(folder, split="train"):
    dataset = open_dataset("folder", split, data_dir=str(folder))
    assert dataset.captions
    return dataset.read(np.arange(dataset.size)[::-1])["caption"].tolist()[::-1]


def test_captions_from_a_file_or_from_beside_each_image(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / "one" / f"{name}.png")
        (tmp_path / "one" / f"{name}.txt").write_text(f" an {name} \u00e9\n", encoding="utf-8")
        for split in ("train", "test"):
            put(tmp_path / "two" / split / f"{name}.png")
    assert captions_of(tmp_path / "one") == ["an a \u00e9", "an b \u00e9"]
    lines = [{"file_name": f"{s}/{n}.png", "caption": f"{n} of {s}"} for n in "ba" for s in ("train", "test")]
    (tmp_path / "two" / "captions.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert captions_of(tmp_path / "two") == ["a of train", "b of train"]
    assert captions_of(tmp_path / "two", "test") == ["a of test", "b of test"]
    (tmp_path / "one" / "notes.txt").write_text("beside no image")
    assert not open_folder(str(put(tmp_path / "three" / "a.png").parent)).captions


def test_captions_that_can_not_be_read_are_told(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("an a")
    with pytest.raises(JaxdiffError, match=r"b\.png has no caption in a \.txt beside it"):
        open_folder(str(tmp_path))
    (tmp_path / "b.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(JaxdiffError, match=r"b\.txt are not UTF-8"):
        open_folder(str(tmp_path))
    listed = tmp_path / "captions.jsonl"
    for text, said in (
        ('{"file_name": "a.png", "caption": "an a"}', r"b\.png has no caption in .*captions\.jsonl"),
        ('{"file_name": "a.png"', "line 1 of .* is not of the form"),
        ('\n{"file_name": "a.png"}', "line 2 of .* is not of the form"),
        ('["a.png", "an a"]', "is not of the form"),
        ('{"file_name": "a.png", "caption": 3}', "is no text"),
    ):
        listed.write_text(text)
        with pytest.raises(JaxdiffError, match=said):
            open_folder(str(tmp_path))
