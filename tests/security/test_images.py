"""Images that would take memory without end, or are no files."""

from __future__ import annotations

import functools
import os
import struct
import zlib

import pytest
from PIL import Image

from albef_ds.data.images import ImageError, decode_image
from tests.data.damaged import encoded
from tests.fuzz.guard import guarded


def png(width: int, height: int, *others: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *others, (b"IDAT", zlib.compress(b""))]
    parts = (
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in (*chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def patched(form: str, old: bytes, new: bytes) -> bytes:
    data = encoded(Image.new("RGB", (37, 41)), form)
    assert old in data
    return data.replace(old, new)


SIDE = 60_000
HUGE = {
    "PNG": png(SIDE, SIDE),
    "JPEG": patched("JPEG", struct.pack(">HH", 41, 37), struct.pack(">HH", SIDE, SIDE)),
    "GIF": patched("GIF", struct.pack("<HH", 37, 41), struct.pack("<HH", SIDE, SIDE)),
    "BMP": patched("BMP", struct.pack("<II", 37, 41), struct.pack("<II", SIDE, SIDE)),
    "PPM": b"P6\n60000 60000\n255\n" + bytes(100),
    "TIFF": patched("TIFF", struct.pack("<I", 37), struct.pack("<I", 1 << 30)),
    "JPEG 2000": patched("JPEG2000", struct.pack(">II", 41, 37), struct.pack(">II", SIDE, SIDE)),
    "WebP": patched("WEBP", struct.pack("<HH", 37, 41), struct.pack("<HH", 0x3FFF, 0x3FFF)),
}


@pytest.mark.parametrize("form", HUGE)
def test_an_image_that_claims_billions_of_pixels_is_refused_before_it_takes_memory(tmp_path, form):
    with guarded(tmp_path), pytest.raises(ImageError, match="pixels|dimensions|size"):
        decode_image(HUGE[form], key="bomb")


@functools.cache
def packed_zeros() -> bytes:
    return zlib.compress(bytes(1 << 30), 9)


@pytest.mark.parametrize("name, data", [(b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")])
def test_what_is_packed_beside_the_pixels_is_not_unpacked_without_end(tmp_path, name, data):
    bomb = png(8, 8, (name, data + packed_zeros()))
    assert len(bomb) < 2 << 20
    with guarded(tmp_path), pytest.raises(ImageError):
        decode_image(bomb, key="bomb")


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_an_image_that_is_a_pipe_or_a_device_is_not_waited_for(tmp_path, make):
    make(tmp_path / "a.jpg")
    with guarded(tmp_path), pytest.raises(ImageError, match="not an ordinary file"):
        decode_image(tmp_path / "a.jpg")


def test_grey_of_16_bits_takes_few_bytes_a_pixel(tmp_path):
    grey = Image.new("I;16", (7000, 7000), 40_000)  # 98 MB
    data = encoded(grey, "PNG")
    with guarded(tmp_path):
        assert decode_image(data).getpixel((5, 5)) == (40_000 >> 8,) * 3
