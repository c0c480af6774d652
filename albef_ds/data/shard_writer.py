"""The two halves of a shard: an image known to be sound, and a tar that knows its own checksum."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile

from PIL import Image

from albef_ds.data.images import ImageError, decode_image
from albef_ds.data.jpeg import END_OF_IMAGE, read_jpeg_header
from albef_ds.data.shard_format import BLOCK

_LARGEST_FILE = 512 << 20


class HashedTar:
    """A tar of plain files: the same contents give the same bytes."""

    def __init__(self, file):
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Returns where the data begin."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        start = self.size
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return start

    def close(self) -> None:
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def sound_jpeg(path: str, key: str, settings: dict) -> bytes:
    """The file's own bytes where it is a baseline colour JPEG of the size wanted, else its picture written as one.

    The picture is decoded in full in either case. Raises ImageError where that is impossible.
    """
    data = _read(path, key)
    image = decode_image(data, settings["max_pixels"], key=key)
    header, side = read_jpeg_header(data), settings["shorter_side"]
    too_large = side is not None and min(image.size) > side
    if header and header.plain and not too_large and data.endswith(END_OF_IMAGE):
        return data
    if too_large:
        scale = side / min(image.size)
        image = image.resize([max(side, round(n * scale)) for n in image.size], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=settings["quality"])
    except (OSError, ValueError) as error:  # beyond 65,500 pixels a side
        raise ImageError(key, f"{image.width} x {image.height} pixels cannot be written as JPEG: {error}") from error
    return buffer.getvalue()


def _read(path: str, key: str) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would never end
            raise ImageError(key, "not a file")
        if found.st_size > _LARGEST_FILE:
            raise ImageError(key, f"{found.st_size:,} bytes, more than the allowed {_LARGEST_FILE:,}")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ImageError(key, "the file does not exist") from None
    except (OSError, ValueError) as error:
        raise ImageError(key, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
