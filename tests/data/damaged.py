"""Every kind of damage that files from the web come with."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image


def photo(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def header_bomb(side: int = 60_000) -> bytes:
    """A JPEG of a few hundred bytes whose header promises side x side pixels."""
    data = encoded(photo())
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def scrambled() -> bytes:
    """Sound header and end, a Huffman table between that no decoder accepts: only decoding shows it."""
    data = bytearray(encoded(photo(256, 256)))
    data[data.index(b"\xff\xc4") + 4] = 0x77
    return bytes(data)


def unusable() -> dict[str, bytes]:
    whole = encoded(photo())
    return {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "bomb": header_bomb(),
        "html": b"<!doctype html><title>404</title>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "header_only": whole[:4],
    }


def unusual() -> dict[str, bytes]:
    """Sound, yet not what a hardware decoder takes; each of them is to become a picture of 64 x 48."""
    image = photo()
    alpha = image.convert("RGBA")
    alpha.putalpha(100)
    palette = image.quantize(16)
    grey16 = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) << 8) + 3)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "cmyk": encoded(image.convert("CMYK")),
        "grey": encoded(image.convert("L")),
        "grey16": encoded(grey16, "PNG"),
        "palette_alpha": encoded(palette, "PNG", transparency=0),
        "alpha": encoded(alpha, "PNG"),
        "animated": encoded(image, "GIF", save_all=True, append_images=[photo(seed=1)]),
        "wrong_extension": encoded(image, "WEBP", lossless=True),
        "progressive": encoded(image, progressive=True),
        "exif_rotated": encoded(image, exif=rotated),
        "trailing": encoded(image) + b"trailing rubbish",
    }


CAPTIONS = {
    "nul": "a dog\x00 runs",
    "emoji": "a 🐕‍🦺 on grass",
    "long": "word " * 10_000,
    "surrogate": "half \ud83d of it",
    "markup": '<script>alert(1)</script> & "quoted"',
}
