import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from fedtalora_flwr.data import DataError, Source, Split, load_images, stack_images, stored_side
from fedtalora_flwr.data.images import decode_image, to_rgb
from fedtalora_flwr.data.source import NO_ROWS


def image_split(images: list[PIL.Image.Image]) -> Split:
    return Split(np.zeros(len(images), dtype=np.int64), lambda rows: [images[row] for row in rows])


def test_an_image_that_fits_is_copied_pixel_by_pixel(make_image):
    images = [make_image(5, 5, value=value) for value in (0, 90)]
    stacked = stack_images(images, side=5)
    assert stacked.dtype == torch.uint8 and stacked.shape == (2, 3, 5, 5)
    for pixels, image in zip(stacked, images, strict=True):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))


def test_mixed_sizes_come_to_one_side(make_image):
    images = [make_image(9, 5), make_image(3, 11), make_image(7, 7), make_image(4, 4)]
    assert stack_images(images, side=7).shape == (4, 3, 7, 7)


@pytest.mark.parametrize(("width", "height"), [(24, 8), (8, 24)])
def test_the_centre_square_of_the_scaled_image_is_kept(make_image, width, height):
    image = make_image(width, height)
    scaled = image.resize((width // 2, height // 2), PIL.Image.Resampling.BICUBIC)
    left, top = (scaled.width - 4) // 2, (scaled.height - 4) // 2
    centre = np.asarray(scaled)[top : top + 4, left : left + 4]
    (stacked,) = stack_images([image], side=4)
    np.testing.assert_array_equal(stacked.permute(1, 2, 0).numpy(), centre)


def test_scaling_down_averages_instead_of_picking_pixels():
    stripes = np.zeros((16, 16, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    stacked = stack_images([PIL.Image.fromarray(stripes)], side=4).float()
    assert (stacked - 127.5).abs().max() < 30


def test_no_images_make_an_empty_stack():
    assert stack_images([], side=6).shape == (0, 3, 6, 6)


def test_loading_block_by_block_equals_stacking_at_once(make_image, monkeypatch):
    monkeypatch.setattr("fedtalora_flwr.data.images._BLOCK", 3)
    images = [make_image(4 + i, 6, value=i) for i in range(8)]
    rows = np.array([7, 0, 3, 3, 1, 6, 2])
    loaded = load_images(image_split(images), rows, side=5)
    assert torch.equal(loaded, stack_images([images[row] for row in rows], side=5))


@pytest.mark.parametrize(("size", "side"), [(224, 6), (4, 4)])
def test_stored_side_is_the_smaller_of_model_and_first_image(make_image, size, side):
    source = Source("pictures", "image", ("a",), image_split([make_image(9, 6), make_image(2, 2)]), NO_ROWS)
    assert stored_side(source, size=size) == side


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_8_bit_mode_becomes_rgb(make_image, mode):
    assert to_rgb(make_image(3, 2, mode=mode), where="it").mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_mode_with_more_than_8_bits_is_an_error(mode):
    with pytest.raises(DataError, match=f"image 1 has image mode {mode}"):
        stack_images([PIL.Image.new("L", (3, 2)), PIL.Image.new(mode, (3, 2))], side=2)


def drawn_in_transparency(mode: str) -> PIL.Image.Image:
    """One colour everywhere, and a shape, the left pixel of two, that is in the transparency alone."""
    if mode in ("LA", "RGBA"):
        image = PIL.Image.new(mode, (2, 1), 0)
        image.putalpha(PIL.Image.frombytes("L", (2, 1), b"\xff\x00"))
        return image
    image = PIL.Image.frombytes("P", (2, 1), b"\0\1")  # two entries of the palette, of one colour
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.info["transparency"] = b"\xff\x00"
    return image


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_a_shape_that_is_in_the_transparency_alone_is_seen_on_grey(mode):
    image = to_rgb(drawn_in_transparency(mode), where="it")
    assert [image.getpixel((column, 0)) for column in range(2)] == [(0, 0, 0), (128, 128, 128)]


def test_one_colour_that_stands_for_nothing_is_grey():
    image = PIL.Image.frombytes("RGB", (2, 1), bytes([9, 8, 7, 1, 2, 3]))
    image.info["transparency"] = (9, 8, 7)
    assert [to_rgb(image, where="it").getpixel((column, 0)) for column in range(2)] == [(128, 128, 128), (1, 2, 3)]


def test_half_transparent_is_half_way_to_grey():
    assert to_rgb(PIL.Image.new("RGBA", (1, 1), (28, 228, 128, 128)), where="it").getpixel((0, 0)) == (78, 178, 128)


def test_a_picture_taken_sideways_is_turned_upright():
    sideways = PIL.Image.new("RGB", (6, 4))
    exif = sideways.getexif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    content = io.BytesIO()
    sideways.save(content, "JPEG", exif=exif)
    assert decode_image(content.getvalue(), where="it").size == (4, 6)


def test_of_several_frames_or_pages_the_first_is_the_picture():
    frames = [PIL.Image.new("RGB", (3, 2), (value, 0, 0)) for value in (200, 100, 0)]
    for kind in ("GIF", "TIFF"):
        content = io.BytesIO()
        frames[0].save(content, kind, save_all=True, append_images=frames[1:])
        assert decode_image(content.getvalue(), where="it").getpixel((0, 0)) == (200, 0, 0)


def _png(size: int) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("content", [b"", b"not an image", _png(20)[:300], _png(20)[:20]])
def test_broken_bytes_are_an_error_that_says_where(content):
    with pytest.raises(DataError, match="row 4 of x cannot be decoded"):
        decode_image(content, where="row 4 of x")


def test_importing_the_package_loads_no_heavy_library():
    code = "import fedtalora_flwr.data, sys; print(sorted({'torch','datasets','sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
