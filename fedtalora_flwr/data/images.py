"""Pictures: file or bytes -> 8-bit RGB -> one uint8 tensor; normalising and enlarging are the device's."""

import io
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps

from fedtalora_flwr.data.source import DataError, Ints, Source, Split

if TYPE_CHECKING:  # torch takes seconds to import, and most users of this package never stack an image
    from torch import Tensor

# Modes that 8-bit RGB can stand for; what is transparent is laid over BACKGROUND.
CONVERTIBLE = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

# Grey: on white or black, a shape that is drawn in the transparency alone and has that colour would be gone.
BACKGROUND = (128, 128, 128)

# Formats that PIL lists as files it opens, and does not read: it knows their first bytes alone, or asks Ghostscript.
_NOT_READ = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
_READ_AS_ANOTHER = frozenset({"MPO"})  # which the reader of JPEG takes

# What PIL's decoders raise for a broken file, by format.
_UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, PIL.Image.DecompressionBombError)

_BLOCK = 256  # images decoded at a time: bounds the memory that originals of any size take


@cache
def image_endings() -> tuple[str, ...]:
    """List the endings (``.png``, lower case) of files in a format that can be read here, not only written."""
    endings = PIL.Image.registered_extensions()  # imports PIL's readers, which fills PIL.Image.OPEN
    read = (PIL.Image.OPEN.keys() | _READ_AS_ANOTHER) - _NOT_READ
    return tuple(sorted(ending for ending, kind in endings.items() if kind in read))


def to_rgb(image: PIL.Image.Image, *, where: str) -> PIL.Image.Image:
    """Convert to 8-bit RGB; what is transparent shows `BACKGROUND`.

    Parameters
    ----------
    image
        In any mode; one that is in RGB and opaque is returned as it is.
    where
        What to call the image in a message.

    Raises
    ------
    DataError
        If the mode holds more than 8 bits a channel (I;16, I, F) or is unknown: converting would clip values.
    """
    if image.mode not in CONVERTIBLE:
        raise DataError(
            f"{where} has image mode {image.mode}, which 8-bit RGB cannot hold without losing information; "
            "scale its values and save it as 8-bit greyscale or RGB first"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")  # of a palette, or of one colour that stands for nothing, too
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, BACKGROUND), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(content: bytes | Path, *, where: str) -> PIL.Image.Image:
    """Decode a picture completely, upright (EXIF) and in RGB.

    Of several pages or frames the first is the picture.

    Parameters
    ----------
    content
        The file's bytes, or its path.
    where
        What to call the image in a message.

    Raises
    ------
    DataError
        If it cannot be decoded, or as in `to_rgb`.
    """
    try:
        with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.load()
            return upright_rgb(image, where=where)
    except PIL.UnidentifiedImageError as error:  # whose text repeats the path
        reason = "its content is of no format known here"
        raise DataError(f"{where} cannot be decoded as an image ({reason}); replace or remove it") from error
    except DataError:
        raise
    except _UNDECODABLE as error:
        raise DataError(f"{where} cannot be decoded as an image ({error}); replace or remove it") from error


def frames_in(file: Path) -> int:
    """Count the frames or pages of an image file, of which the first is the picture; 0 where it is none."""
    try:
        with PIL.Image.open(file) as image:
            return int(getattr(image, "n_frames", 1))
    except _UNDECODABLE:
        return 0


def upright_rgb(image: PIL.Image.Image, *, where: str) -> PIL.Image.Image:
    """Turn a picture as its EXIF says, and convert it as `to_rgb` does, with the same errors."""
    return to_rgb(PIL.ImageOps.exif_transpose(image), where=where)


def stored_side(source: Source, *, size: int) -> int:
    """Give the side to store a source's images at: no larger than the model takes, nor than they are.

    Parameters
    ----------
    source
        Images; its `image_side`, or the first of the training split, decides for all.
    size
        Side of the model's input in pixels.
    """
    assert source.modality == "image", source.name
    return int(min(size, _side_at_hand(source)))


def joint_side(sources: Sequence[Source]) -> float | None:
    """Give the side at which images of all these are stored, so that none loses pixels; None for text."""
    return max((_side_at_hand(source) for source in sources if source.modality == "image"), default=None)


def _side_at_hand(source: Source) -> float:
    if source.image_side is not None:
        return source.image_side
    first = source.train.read(np.zeros(1, dtype=np.int64))[0]
    return float(min(first.width, first.height))


def stack_images(images: Sequence[PIL.Image.Image], *, side: int) -> "Tensor":
    """Stack images of any size and mode as squares.

    An image of another size is cut and scaled by `square`; one that fits is copied once.

    Parameters
    ----------
    images
        N images.
    side
        Side of the squares in pixels.

    Returns
    -------
    pixels
        uint8 (N, 3, side, side).

    Raises
    ------
    DataError
        If an image has a mode that `to_rgb` refuses.
    """
    import torch

    pixels = np.empty((len(images), 3, side, side), dtype=np.uint8)
    _fill(pixels, images)
    return torch.from_numpy(pixels)


def square(image: PIL.Image.Image, *, side: int) -> PIL.Image.Image:
    """Scale an RGB image (bicubic, antialiased) so that its shorter side is `side` pixels, and cut its centre out."""
    if image.size == (side, side):
        return image
    shorter = min(image.size)
    left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
    # Scaling the centre square alone equals scaling all and cutting, at a fraction of the work.
    return image.resize((side, side), PIL.Image.Resampling.BICUBIC, box=(left, top, left + shorter, top + shorter))


def load_images(split: Split, rows: Ints, *, side: int) -> "Tensor":
    """Read and stack rows of a split block by block, so that few originals are in memory at a time.

    Parameters
    ----------
    split
        Images.
    rows
        (n,) row numbers.
    side
        As in `stack_images`.

    Returns
    -------
    pixels
        uint8 (n, 3, side, side).
    """
    import torch

    pixels = np.empty((len(rows), 3, side, side), dtype=np.uint8)
    for start in range(0, len(rows), _BLOCK):
        _fill(pixels[start : start + _BLOCK], split.read(rows[start : start + _BLOCK]))
    return torch.from_numpy(pixels)


def _fill(pixels: np.ndarray, images: Sequence[PIL.Image.Image]) -> None:
    for number, (slot, image) in enumerate(zip(pixels, images, strict=True)):
        stored = square(to_rgb(image, where=f"image {number}"), side=pixels.shape[-1])
        slot[...] = np.asarray(stored).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)
