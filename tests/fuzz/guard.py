"""What a reader may not do, whatever it is given: start anything, use the network, write elsewhere, take long or much.

Python reports such acts to audit hooks before they happen. A hook cannot be taken away again, so there is one for the
whole process, which looks only at what is done inside `guarded`. Compiled code below Python is not seen.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_SECONDS = 10.0
MOST_BYTES = 512 << 20  # by which the process may grow while it reads one input, at any moment

_STARTS = frozenset(
    ("os.system os.exec os.posix_spawn os.spawn os.fork os.forkpty os.startfile pty.spawn subprocess.Popen os.kill "
     "pickle.find_class ctypes.dlopen webbrowser.open urllib.Request").split()
)  # fmt: skip
_CHANGES = frozenset(
    ("os.mkdir os.rename os.remove os.rmdir os.symlink os.link os.chmod os.chown os.truncate os.utime "
     "shutil.rmtree shutil.move shutil.copyfile tempfile.mkstemp tempfile.mkdtemp").split()
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_folder: str | None = None  # of the reader at work
_seen: list[str] = []
_installed = False


class Misdeed(AssertionError):
    """A reader did what no reader may do."""


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Raises Misdeed where what runs inside started something, wrote outside of `folder`, or took too much.

    The act itself is refused at once, by an error that the reader may swallow; it is named here all the same.
    """
    global _folder, _installed
    if not _installed:
        sys.addaudithook(_audit)
        _installed = True
    _seen.clear()
    before, start = _resident(reset=True), time.monotonic()
    _folder = os.path.realpath(folder)
    try:
        yield
    finally:
        _folder = None
    seconds, grown = time.monotonic() - start, _resident() - before
    if _seen:
        raise Misdeed("; ".join(_seen))
    if seconds > MOST_SECONDS:
        raise Misdeed(f"took {seconds:.1f} s, more than {MOST_SECONDS} s")
    if grown > MOST_BYTES:
        raise Misdeed(f"took {grown:,} bytes of memory, more than {MOST_BYTES:,}")


def _audit(event: str, arguments: tuple) -> None:
    if _folder is None:
        return
    if event in _STARTS or event.startswith("socket."):
        _refuse(f"{event}{arguments!r:.200}")
    elif event == "open":
        path, _, flags = arguments
        if flags & _WRITING and not _inside(path):
            _refuse(f"wrote to {path!r}")
    elif event in _CHANGES and not all(_inside(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)):
        _refuse(f"{event}{arguments!r:.200}")


def _inside(path) -> bool:
    if isinstance(path, int):  # a file that is open already
        return True
    where = os.path.realpath(os.fsdecode(path))
    return where == _folder or where.startswith(f"{_folder}{os.sep}")


def _refuse(what: str) -> None:
    _seen.append(what)
    raise PermissionError(f"refused by the test: {what}")


def _resident(reset: bool = False) -> int:
    """Most bytes of memory held since the last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) << 10
