"""The edge between numbers and pictures."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import JaxdiffError
from jaxdiff.images import make_grid_image, save_animation, save_arrays, save_image, to_float, to_uint8

GREY = np.arange(6 * 8 * 8, dtype=np.uint8).reshape(6, 8, 8, 1)
RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("xp", [np, jnp])
def test_all_values_come_back(xp):
    values = xp.arange(256, dtype=xp.uint8)
    images = to_float(values)
    assert images.dtype == np.float32
    assert (float(images[0]), float(images[-1])) == (-1.0, 1.0)
    np.testing.assert_allclose(np.diff(images), 2 / 255, rtol=1e-4)
    np.testing.assert_array_equal(to_uint8(images), values)


def test_what_is_out_of_range_is_clipped_and_the_rest_rounded():
    images = jnp.asarray([-3.0, -jnp.inf, 3.0, jnp.inf, jnp.nan, 0.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1])
    assert to_uint8(images).tolist() == [0, 0, 255, 255, 0, 128, 100, 101]


@pytest.mark.parametrize("images", [GREY, RGB], ids=["grey", "rgb"])
def test_a_grid_shows_every_image_in_its_place(images, tmp_path):
    save_image(images, tmp_path / "new" / "grid.png", columns=4)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        grid = np.asarray(picture).reshape(picture.height, picture.width, -1)
    cell_height, cell_width = grid.shape[0] // 2, grid.shape[1] // 4
    zoom = (cell_width - 2) // 8
    assert zoom >= 1
    for i, image in enumerate(images):
        row, column = divmod(i, 4)
        cell = grid[row * cell_height :, column * cell_width :][1 : cell_height - 1, 1 : cell_width - 1]
        np.testing.assert_array_equal(cell[::zoom, ::zoom], image)
        np.testing.assert_array_equal(cell[zoom - 1 :: zoom, zoom - 1 :: zoom], image)
    assert (grid[cell_height:, 2 * cell_width :] == 255).all()  # the two places that are left over


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 3), (9, 3), (10, 4)])
def test_a_grid_is_square_unless_told_otherwise(count, columns):
    picture = make_grid_image(np.zeros((count, 100, 100, 1), np.uint8))
    assert picture.width == columns * 102
    assert picture.height == -(-count // columns) * 102


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_shows_its_frames_and_rests_on_the_last(suffix, tmp_path):
    frames = np.stack([GREY // 3, GREY // 2, GREY])
    path = tmp_path / f"a{suffix}"
    save_animation(frames, path, seconds=1.5)
    with Image.open(path) as picture:
        assert picture.n_frames == 3
        durations = []
        for i in range(3):
            picture.seek(i)
            picture.load()
            durations.append(picture.info["duration"])
        assert durations == [500, 500, 1500]
        if suffix == ".gif":
            np.testing.assert_array_equal(np.asarray(picture.convert("L")), np.asarray(make_grid_image(GREY)))


def test_a_picture_of_no_known_kind_is_told_and_not_written(tmp_path):
    for name in ("grid", "grid.", "grid.docx"):
        with pytest.raises(JaxdiffError, match="suffix"):
            save_image(GREY, tmp_path / name)
    with pytest.raises(JaxdiffError, match=r"\.gif or \.webp"):
        save_animation([GREY], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_arrays_are_written_by_name(tmp_path):
    save_arrays(tmp_path / "deep" / "a.npz", images=RGB, labels=np.arange(6))
    with np.load(tmp_path / "deep" / "a.npz") as arrays:
        assert sorted(arrays) == ["images", "labels"]
        np.testing.assert_array_equal(arrays["images"], RGB)
