"""A folder of the user's own images as a data set: sub-folders are splits and classes."""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from jaxdiff.data.dataset import ImageDataset, from_pictures
from jaxdiff.data.decoding import channels_of, open_image, size_of
from jaxdiff.errors import JaxdiffError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

logger = logging.getLogger("jaxdiff")


def open_folder(
    data_dir: str | None,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
) -> ImageDataset:
    """Open a folder of png, jpg, webp, bmp and gif images (of an animation, the first frame).

    Sub-folders named "train" and "test", where there are no others, are the splits; without them all images are of the
    split "train". Within a split each sub-folder, searched to any depth, is one class. The classes are numbered in the
    order of their names over both splits: one that is empty, or missing from a split, keeps its number, and the log
    warns of it. Images that are in no sub-folder have no classes. Names that start with a dot are passed over.

    Captions are read from `captions.jsonl` in `data_dir`, a line {"file_name": "train/a.png", "caption": "..."} for
    each image of the split, or from a text file beside each, a.txt for a.png; UTF-8.

    Without an `image_size` all images must be of one size. Without `channels` there are 3, or 1 if all images are grey.

    Raises:
        JaxdiffError: the folder or the split is missing or holds no images, some images lie beside sub-folders, sizes
            differ, some images have a caption and others none, a caption cannot be read, or an image cannot be: here if
            its header is broken, when it is read if its pixels are.
    """
    if data_dir is None:
        raise JaxdiffError('the data set "folder" needs data_dir, the folder that holds your images')
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise JaxdiffError(f"there is no folder {root}: set data_dir to the folder that holds your images")
    files, labels, class_names = _list_images(root, split)

    with ThreadPoolExecutor() as pool:
        if channels is None:
            channels = max(pool.map(channels_of, files))
        sizes = [(image_size, image_size)] if image_size else list(pool.map(size_of, files))
    height, width = sizes[0]
    for file, (other_height, other_width) in zip(files, sizes, strict=False):
        if (other_height, other_width) != (height, width):
            raise JaxdiffError(
                f"the images are not of one size: {file} is {other_width}x{other_height} and {files[0]} is "
                f"{width}x{height}; set image_size to have all of them cropped and resized to it"
            )

    def pictures(indices: np.ndarray) -> Iterator[tuple[Image.Image, int]]:
        return ((open_image(files[i]), labels[i]) for i in indices)

    dataset = from_pictures(pictures, len(files), (height, width, channels), class_names, image_size, channels)
    captions = _read_captions(root, files)
    if captions is None:
        return dataset
    read = lambda indices: dataset.read(indices) | {"caption": captions[indices]}  # noqa: E731
    return dataset._replace(read=read, captions=True)


def _read_captions(root: Path, files: list[Path]) -> np.ndarray | None:
    """The caption of each image [N], from captions.jsonl or from a .txt beside each; None where there is neither."""
    listed = root / "captions.jsonl"
    beside = [file.with_suffix(".txt") for file in files]
    if listed.is_file():
        entries = {}
        for number, line in enumerate(_read_text(listed).splitlines(), 1):
            if line.strip():
                name, caption = _caption_of(line, f"line {number} of {listed}")
                entries[(root / name).resolve()] = caption
        captions = [entries.get(file.resolve()) for file in files]
        where = f"in {listed}"
    elif any(path.is_file() for path in beside):
        captions = [_read_text(path).strip() if path.is_file() else None for path in beside]
        where = "in a .txt beside it, as others have"
    else:
        return None
    if None in captions:
        raise JaxdiffError(
            f"the image {files[captions.index(None)]} has no caption {where}: give it one, or take it out"
        )
    return np.array(captions, object)


def _caption_of(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        name, caption = entry["file_name"], entry["caption"]
    except (ValueError, KeyError, TypeError) as error:
        raise JaxdiffError(f'{where} is not of the form {{"file_name": "a.png", "caption": "a cat"}}') from error
    if not isinstance(name, str) or not isinstance(caption, str):
        raise JaxdiffError(f"{where} has a file_name or a caption that is no text")
    return name, caption


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise JaxdiffError(f"the captions in {path} are not UTF-8 ({error}): save the file as UTF-8") from error


def _list_images(root: Path, split: str) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Find the image files of a split, the label of each, and the names of the classes."""
    parts = _subfolders(root)
    has_splits = bool(parts) and parts.keys() <= {"train", "test"}
    if not has_splits:
        parts = {"train": root}
    if split not in parts:
        raise JaxdiffError(
            f"the folder {root} has no {split} split, only {' and '.join(parts)}: choose one that it has, or sort the "
            'images into its sub-folders "train" and "test"'
        )
    class_names = sorted({name for part in parts.values() for name in _subfolders(part)})

    # An image beside sub-folders has no class or no split: to leave it out without a word would be to lose it.
    parents = ([root] if has_splits else []) + (list(parts.values()) if class_names else [])
    if strays := [file for parent in parents for file in _images(parent, "*")]:
        raise JaxdiffError(f"the image {strays[0]} lies beside sub-folders: move it into one of them, or elsewhere")

    groups = [_images(parts[split] / name, "**/*") for name in class_names] or [_images(parts[split], "*")]
    files = [file for group in groups for file in group]
    labels = [label for label, group in enumerate(groups) for _ in group]
    if not files:
        raise JaxdiffError(f"the folder {parts[split]} holds no images: put some into it ({', '.join(SUFFIXES)})")
    for name, group in zip(class_names, groups, strict=False):
        if not group:
            logger.warning("the class %s has no images in %s", name, parts[split])
    return files, labels, tuple(class_names)


def _subfolders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}


def _images(folder: Path, pattern: str) -> list[Path]:
    return [
        path
        for path in sorted(folder.glob(pattern))
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
