"""Files that are whole or not there, and opening what may be anything."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_ordinary(path: str | os.PathLike, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file, as `opener` of `open` gives it; links are followed.

    Raises OSError where it is anything but a file: a pipe or a device would never end, or be waited for.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer is not waited for
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not an ordinary file", os.fspath(path))
    return descriptor


def write_atomically(path: Path, text: str) -> None:
    """The file has either its old contents or all of the new ones, whenever the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The rename itself must reach the disk too.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
