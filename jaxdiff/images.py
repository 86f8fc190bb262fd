"""Images at the edge of the library: float32 in [-1, 1] inside, uint8 outside, pictures on disk."""

import io
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from etils import epath
from jaxtyping import Array, Float, UInt8
from PIL import Image

from jaxdiff.errors import JaxdiffError


def to_float(images: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """0 ... 255 to -1 ... 1, float32; works on NumPy and JAX arrays."""
    return images.astype(np.float32) / 127.5 - 1.0


def to_uint8(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """-1 ... 1 to 0 ... 255, rounded to the nearest; what lies outside is clipped, and NaN becomes 0."""
    return jnp.round(jnp.clip(jnp.nan_to_num(images, nan=-1.0) * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def make_grid_image(images: UInt8[np.ndarray, "N H W C"], columns: int | None = None) -> Image.Image:
    """Images in rows of `columns` (None: as square as can be), a pixel apart, small ones enlarged to be seen."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    zoom = max(1, round(64 / max(height, width)))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    gap = np.full((rows * columns, zoom * height + 2, zoom * width + 2, channels), 255, np.uint8)
    gap[:count, 1:-1, 1:-1] = images
    grid = rearrange(gap, "(r k) h w c -> (r h) (k w) c", k=columns)
    return Image.fromarray(grid[..., 0] if channels == 1 else grid)


def save_image(images: UInt8[np.ndarray, "N H W C"], path: str | Path, columns: int | None = None) -> None:
    """Write a grid of images as a picture, in the format of the path's suffix."""
    buffer = io.BytesIO()  # encoded whole before the file is touched, so that a failure leaves no half of one
    try:
        make_grid_image(images, columns).save(buffer, format=_format(path))
    except (KeyError, ValueError) as error:
        raise JaxdiffError(f"{path} can not be written as a picture ({error}): use .png.") from error
    _write(path, buffer.getvalue())


def save_animation(
    frames: Sequence[UInt8[np.ndarray, "N H W C"]], path: str | Path, columns: int | None = None, seconds: float = 4.0
) -> None:
    """Write grids one after the other as a .gif or .webp that takes about `seconds`, then rests on the last."""
    kind = _format(path)
    if kind not in ("GIF", "WEBP"):
        raise JaxdiffError(f"An animation is written as .gif or .webp, and {path} is neither.")
    pictures = [make_grid_image(frame, columns) for frame in frames]
    each = max(int(1000 * seconds / len(pictures)), 20)
    durations = [each] * (len(pictures) - 1) + [1500]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format=kind, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    _write(path, buffer.getvalue())


def save_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    """Write arrays by name as a compressed .npz."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    _write(path, buffer.getvalue())


def _format(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    kinds = Image.registered_extensions()
    if suffix not in kinds:
        raise JaxdiffError(f"{path} has no suffix that names a kind of picture, such as .png.")
    return kinds[suffix]


def _write(path: str | Path, content: bytes) -> None:
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # so that what bears the name is always whole
    part.write_bytes(content)
    part.replace(path)
