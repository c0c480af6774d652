"""What a JPEG file says about itself in its header; nothing is decoded."""

from __future__ import annotations

from dataclasses import dataclass

_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
END_OF_IMAGE = b"\xff\xd9"


@dataclass(frozen=True)
class JpegHeader:
    width: int
    height: int
    plain: bool  # baseline, 8 bits, three components coded as YCbCr: what every hardware decoder takes


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of the bytes of a JPEG file; None where they are no JPEG file, or it ends before its frame header."""
    if data[:2] != b"\xff\xd8":
        return None
    at, adobe, jfif = 2, None, False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # any number of fill bytes may stand before a marker
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        if marker in (0xD9, 0xDA):
            return None
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if marker in _START_OF_FRAME:
            return _frame(marker, body, adobe, jfif)
        if marker == 0xE0 and body.startswith(b"JFIF"):
            jfif = True
        if marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]  # 0: no colour transform, that is RGB (or CMYK); 1: YCbCr
        at += 2 + length
    return None


def _frame(marker: int, body: bytes, adobe: int | None, jfif: bool) -> JpegHeader | None:
    if len(body) < 6:
        return None
    bits, components = body[0], body[5]
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if not width or not height or len(body) < 6 + 3 * components:
        return None
    named_rgb = bytes(body[6 : 6 + 3 * components : 3]) == b"RGB" and not jfif and adobe is None
    plain = marker == 0xC0 and bits == 8 and components == 3 and adobe != 0 and not named_rgb
    return JpegHeader(width, height, plain)
