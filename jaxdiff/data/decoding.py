"""Pictures of any kind into uint8 arrays: decoding, transparency, 16-bit grey, colour, crop and size."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import numpy as np
from PIL import Image, ImageOps

from jaxdiff.errors import JaxdiffError

_GREY_MODES = ("1", "L", "LA", "La")
_ORIENTATION = 0x0112  # the EXIF tag; its values 5 ... 8 exchange height and width


def open_image(file: str | PathLike) -> Image.Image:
    """Decode the whole of an image file (its first frame), turned upright as its EXIF orientation asks.

    Raises JaxdiffError, naming the file, if it cannot be decoded to its last row.
    """
    with _reading(file) as image:
        return ImageOps.exif_transpose(image)  # of a copy, which decodes it all before the file is closed


def size_of(file: str | PathLike) -> tuple[int, int]:
    """Return (height, width) of an image file as `open_image` would give it, from as little of it as tells."""
    with _reading(file) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return image.size if turned else image.size[::-1]


def channels_of(file: str | PathLike) -> int:
    """Return 1 for a grey image file of any depth, transparent or not, and 3 for every other, from its header."""
    with _reading(file) as image:
        return 1 if image.mode in _GREY_MODES or image.mode.startswith("I") else 3


def to_array(image: Image.Image, image_size: int | None, channels: int) -> np.ndarray:
    """Turn a picture into a uint8 array [H, W, channels].

    Transparent parts are laid over white. `channels` 1 takes the luma of a colour picture, 3 repeats a grey one.
    With an `image_size` the centred square is cut out and resampled (bicubic, antialiased) to that side; with None the
    picture keeps its own height and width.
    """
    image = _opaque(_eight_bits(image))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image_size is not None:
        image = _centre_square(image, image_size)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


@contextmanager
def _reading(file: str | PathLike) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:  # a decoder raises anything from OSError to SyntaxError and struct.error
        raise JaxdiffError(
            f"the image {file} cannot be read ({error}): replace it, or take it out of the folder"
        ) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion of 16-bit grey clips at 255, which turns almost every such picture white.
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.clip(np.asarray(image), 0, 65535) / 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)
