"""Decodes image files that nobody has looked at: what is not a sound image becomes an ImageError, never a crash."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image

from albef_ds.data.files import open_ordinary

MAX_PIXELS = 178_956_970  # Pillow's own limit, about 0.5 GB as RGB

# Files from the web must not choose the decoder among all of Pillow's: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class ImageError(Exception):
    """An image that cannot be used: `key` names it, `reason` says why."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)  # both as args: the error travels between processes
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def decode_image(
    source: str | os.PathLike | bytes, max_pixels: int = MAX_PIXELS, *, key: str | None = None
) -> Image.Image:
    """Decodes a file or the bytes of one to an RGB image of 8 bits.

    Every mode is converted: alpha is dropped, 16-bit grey is scaled down, of an animation the first frame is taken.
    The orientation in EXIF is not applied; the reference does not either. The content decides the format, not the name.
    key: what the error calls the image; default: the path.

    Raises ImageError where the file is missing, empty, truncated, of no known format, or has more than `max_pixels`
    pixels; the last is read from the header, before any memory is taken. Beyond `MAX_PIXELS` Pillow's limit
    (`PIL.Image.MAX_IMAGE_PIXELS`) has to be raised as well.
    """
    name = key or ("image bytes" if isinstance(source, bytes) else os.fspath(source))
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb", opener=open_ordinary) as file:
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(name, f"{width} x {height} pixels, more than the allowed {max_pixels:,}")
            image.load()
        return _to_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise ImageError(name, _reason(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image  # convert() would copy
    if image.mode.startswith("I"):  # convert() would cut 16-bit grey off at 255, that is, make it white
        values = np.clip(np.asarray(image), 0, 65535)  # a copy in 2 or 4 bytes a pixel: wider ones add up to gigabytes
        np.right_shift(values, 8, out=values)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels: {error}"
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    return f"cannot be decoded: {text or type(error).__name__}"
