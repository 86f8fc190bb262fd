"""Pictures into arrays: colour, depth, transparency, orientation, crop and size."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.data.decoding import channels_of, open_image, size_of, to_array
from jaxdiff.errors import JaxdiffError

RNG = np.random.default_rng(0)


def bicubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Keys' cubic (a = -1/2), widened by the factor of a reduction so that it also filters: [n_out, n_in]."""
    width = max(n_in / n_out, 1)
    x = np.abs((np.arange(n_in) + 0.5) - (np.arange(n_out)[:, None] + 0.5) * n_in / n_out) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [4, 9, 20])
def test_crops_the_centre_and_resamples_without_aliasing(size):
    pixels = RNG.integers(0, 256, (9, 14), np.uint8)
    m = bicubic_matrix(9, size)
    across = np.clip(np.rint(pixels[:, 2:11] @ m.T), 0, 255)  # Pillow keeps uint8 between its two passes
    expected = np.clip(m @ across, 0, 255)
    array = to_array(Image.fromarray(pixels), size, 1)
    assert array.shape == (size, size, 1)
    assert array.dtype == np.uint8
    np.testing.assert_allclose(array[:, :, 0], expected, atol=0.51)


def test_a_tall_picture_is_cropped_along_its_height():
    pixels = RNG.integers(0, 256, (9, 4, 3), np.uint8)
    np.testing.assert_array_equal(to_array(Image.fromarray(pixels), 4, 3), pixels[2:6])


def test_native_size_and_colour_are_untouched():
    pixels = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(to_array(Image.fromarray(pixels), None, 3), pixels)


def test_grey_is_repeated_and_colour_becomes_luma():
    pixels = RNG.integers(0, 256, (6, 6, 3), np.uint8)
    grey = pixels[:, :, 0]
    np.testing.assert_array_equal(to_array(Image.fromarray(grey), None, 3), np.stack([grey] * 3, -1))
    luma = pixels @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(to_array(Image.fromarray(pixels), None, 1)[:, :, 0], luma, atol=1)


def test_transparency_shows_white():
    rgba = RNG.integers(0, 256, (6, 6, 4), np.uint8)
    alpha = rgba[:, :, 3:] / 255
    expected = rgba[:, :, :3] * alpha + 255 * (1 - alpha)
    np.testing.assert_allclose(to_array(Image.fromarray(rgba), None, 3), expected, atol=1)
    grey_alpha = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(to_array(grey_alpha, None, 1)[0, :, 0], [255, 10])


def test_transparent_colour_of_a_palette_shows_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.save(tmp_path / "palette.png", transparency=1)
    array = to_array(open_image(tmp_path / "palette.png"), None, 3)
    np.testing.assert_array_equal(array, [[[255, 0, 0], [255, 255, 255]]])


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(to_array(open_image(tmp_path / "deep.png"), None, 1)[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_turns_the_picture_upright(tmp_path, suffix):
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / f"turned.{suffix}", exif=exif)
    upright = to_array(open_image(tmp_path / f"turned.{suffix}"), None, 1)[:, :, 0]
    np.testing.assert_allclose(upright, np.rot90(pixels, -1), atol=3)
    assert size_of(tmp_path / f"turned.{suffix}") == upright.shape == (16, 8)


def test_an_animation_gives_its_first_frame(tmp_path):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[blue])
    np.testing.assert_array_equal(to_array(open_image(tmp_path / "moving.gif"), None, 3)[0, 0], [255, 0, 0])


def test_channels_from_the_header(tmp_path):
    for mode, expected in {"L": 1, "1": 1, "LA": 1, "I;16": 1, "RGB": 3, "RGBA": 3, "P": 3}.items():
        file = tmp_path / f"{mode.replace(';', '')}.png"
        Image.new(mode, (2, 2)).save(file)
        assert channels_of(file) == expected, mode


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_image_is_named(tmp_path, suffix):
    file = tmp_path / f"half.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(JaxdiffError, match=rf"the image .*half\.{suffix} cannot be read .*: replace it"):
        open_image(file)


@pytest.mark.parametrize("function", [open_image, size_of, channels_of])
def test_what_is_no_image_is_named(tmp_path, function):
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(JaxdiffError, match=r"the image .*notes\.png cannot be read"):
        function(tmp_path / "notes.png")
