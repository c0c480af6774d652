"""One owner at a time for a folder that is written to: a run's, a demo's, a packing's.

    RUN/owner.json      there while somebody writes to RUN: who, where, since when, and how often it gave a sign of life

The file is locked (flock), and the lock dies with its owner, however that ends. Some network file systems know no
locks, or keep them to one machine; there the sign of life stands in: the owner writes the file anew every few seconds,
and whoever finds one that another machine has left watches it for a while before it takes the folder. Nothing here
compares clocks.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path

log = logging.getLogger(__name__)

OWNER = "owner.json"
BEAT_SECONDS = 5.0  # between two signs of life
SILENCE_SECONDS = 20.0  # without one, where a lock alone tells nothing
_LARGEST = 1 << 16  # bytes that are read of an owner.json
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class FolderError(RuntimeError):
    """A folder that another process writes to, or that cannot be written to; the message names it and who holds it."""


class FolderLock:
    """Within, this process alone writes to `folder`, which is made where it is not there.

    Raises FolderError on entering. Should another process take the folder later nevertheless (somebody removed the
    file, or this process stood still for too long where there are no locks), this process ends with status 2.
    """

    def __init__(self, folder: str | os.PathLike, beat: float = BEAT_SECONDS, silence: float = SILENCE_SECONDS):
        self.folder, self.path = Path(folder), Path(folder) / OWNER
        self._beat, self._silence = beat, silence
        self._own = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "user": _user(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.orig_argv)[:1000],
            "boot": _boot(),
            "token": uuid.uuid4().hex,
        }
        self._beats = 0
        self._ending = threading.Event()

    def __enter__(self) -> FolderLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise FolderError(
                f"{self.folder}: cannot be written to: {self.path.name}: {error.strerror or error}; make it writable, "
                "or choose another folder"
            ) from error
        self._thread = threading.Thread(target=self._keep, name="folder owner", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ending.set()
        self._thread.join(self._beat)
        try:
            if _token(_read(self.path)) == self._own["token"]:
                self.path.unlink()
        except OSError:
            pass  # the folder is gone, or full of trouble that others tell of
        finally:
            self._close()

    def _close(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # for a forked child too, which has the same open file
        except OSError:
            pass
        os.close(self._file)

    # -- taking it -----------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        while True:
            self._file = self._open()
            try:
                locked = self._lock()
                if not _is_at(self._file, self.path):  # its owner has ended just now, and removed it
                    self._close()
                    continue
                self._look_for_another(locked)
                self._say()
                return
            except BaseException:
                os.close(self._file)
                raise

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except PermissionError:
            if not (said := _read(self.path)):
                raise
            raise FolderError(
                f"{self.folder} may be in use: {self.path} is of {_who(said)}, and cannot be locked from here. If that "
                "has ended, remove this file; else choose another folder"
            ) from None

    def _lock(self) -> bool:
        """Whether it is locked now; False: the file system knows no locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise self._held() from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: its file system knows no locks; signs of life must do", self.path)
            return False

    def _look_for_another(self, locked: bool) -> None:
        """After an owner that did not remove the file: whether it lives, for all that the lock says."""
        left = _read(self.path)
        if _token(left) is None or (locked and _parsed(left).get("boot") == self._own["boot"]):
            return  # nobody's, or of this machine, where the lock has died with it
        log.warning("%s: left by %s; watching %g s for a sign of life", self.path, _who(left), self._silence)
        deadline = time.monotonic() + self._silence
        while time.monotonic() < deadline:
            time.sleep(self._beat / 10)
            if _read(self.path) != left:
                raise self._held()
        log.warning("%s: no sign of life: taken over", self.folder)

    def _held(self) -> FolderError:
        deadline = time.monotonic() + 1
        while not (said := _read(self.path)) and time.monotonic() < deadline:
            time.sleep(0.02)  # it has just taken it, and is about to write who it is
        return FolderError(
            f"{self.folder} is in use: {_who(said)} writes to it. Wait until that has ended, end it, or choose another "
            "folder"
        )

    # -- keeping it ----------------------------------------------------------------------------------------------------

    def _say(self) -> None:
        text = json.dumps({**self._own, "beats": self._beats}, indent=1) + "\n"
        if self._beats == 0:
            os.ftruncate(self._file, 0)  # later it grows, if anything, so that what is read is whole
        os.pwrite(self._file, text.encode(), 0)
        self._beats += 1

    def _keep(self) -> None:
        while not self._ending.wait(self._beat):
            try:
                found = _read(self.path)
                if found is None:
                    self._put_back()
                elif _token(found) != self._own["token"]:
                    self._give_way(found)
                else:
                    self._say()
            except OSError:
                continue  # the file system is away for now

    def _put_back(self) -> None:
        """Somebody removed the file."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                return  # another process opened it at once: the next look will tell
        self._close()
        self._file, self._beats = file, 0
        self._say()

    def _give_way(self, found: bytes) -> None:
        if self._ending.is_set():
            return
        rank = os.environ.get("RANK", "0")
        message = f"albef_ds: rank {rank} ends: {self.folder} was taken over by {_who(found)}\n"
        os.write(2, message.encode())
        os._exit(2)


def _read(path: Path) -> bytes | None:
    """Opened anew every time: a network file system then asks its server. None: there is none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return os.read(file, _LARGEST)
    finally:
        os.close(file)


def _token(text: bytes | None) -> str | None:
    return _parsed(text).get("token")


def _parsed(text: bytes | None) -> dict:
    try:
        found = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _who(text: bytes | None) -> str:
    """The owner in words, for a terminal: it may be a stranger's file."""
    found = _parsed(text)
    if "process" not in found:
        return f"another process (its {OWNER} cannot be read)"
    words = {key: str(found.get(key, "unknown")) for key in ("process", "host", "user", "since", "command")}
    words = {key: word if word.isprintable() else ascii(word) for key, word in words.items()}
    return "process {process} on {host} (user {user}), since {since}: {command}".format(**words)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _boot() -> str:
    """What tells this machine, since it was started, from all others; containers on it share it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # nobody's
