"""One owner at a time for a folder that is written to: that of a run, of an evaluation, of a packing.

    RUN/.owner.json     there while somebody writes to RUN: who, where, since when, and its signs of life, counted

The file is locked (flock), and the lock goes with its owner, however that ends. Some network file systems know no
locks, keep them to one machine, or keep those of a machine that has failed for a while; there the sign of life decides:
the owner writes the file anew every few seconds, and whoever finds one of another machine watches it. Nothing here
compares clocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import json
import logging
import os
import random
import shlex
import socket
import sys
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path

from albef_ds.processes import say

log = logging.getLogger(__name__)

OWNER = ".owner.json"
BEAT_SECONDS = 5.0  # between two signs of life
SILENCE_SECONDS = 20.0  # without one, where a lock alone tells nothing
LEASE_SECONDS = 120.0  # after which a server has let go of a lock whose machine has failed (NFSv4: 90)
_LARGEST = 1 << 16  # bytes that are read of an owner's file
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class FolderError(RuntimeError):
    """A folder that another process writes to, or that cannot be written to; the message names it and who holds it."""


class FolderLock:
    """Within, this process alone writes to `folder`, which is made where it is not there.

    Raises FolderError on entering. Should another process take the folder later nevertheless (somebody removed the
    file, or this process stood still for too long where there are no locks), this process ends with status 2.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        beat: float = BEAT_SECONDS,
        silence: float = SILENCE_SECONDS,
        lease: float = LEASE_SECONDS,
    ):
        self.folder, self.path = Path(folder), Path(folder) / OWNER
        self._beat, self._silence, self._lease = beat, silence, lease
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
        self._intruder: bytes | None = None
        self._ending = threading.Event()
        self.until_the_end = False  # of the process: set where it may go on writing after this context

    def __enter__(self) -> FolderLock:
        try:
            self._made = not self.folder.exists()
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
        if self._thread.is_alive() or self.until_the_end:  # else it might write to what has this file's number then
            return
        with contextlib.suppress(OSError):  # the folder is gone, or its disk is
            if self._is_ours():
                self.path.unlink()
            if self._made:
                self.folder.rmdir()  # where nothing came of it
        os.close(self._file)

    def _is_ours(self) -> bool:
        try:
            return _token(_read(self.path)) == self._own["token"]
        except PermissionError:  # where what is locked is read by nobody else, it is locked by this process
            return True

    # -- taking it -----------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        while True:
            self._file = self._open()
            try:
                locked = self._lock()
                if locked is not None and _is_at(self._file, self.path) and not self._another_ends(locked):
                    self._say()
                    if not locked:
                        self._settle()
                    return
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)  # its owner has ended just now, and removed it

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        for attempt in range(10):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(self.path, flags, 0o666)
            except FileNotFoundError:  # the folder was removed meanwhile
                if attempt == 9:
                    raise
            except PermissionError:
                if not (said := _read(self.path)):
                    raise
                raise FolderError(
                    f"{self.folder} may be in use: {self.path} belongs to {_who(said)}, and cannot be locked from "
                    "here. If that has ended, remove the file; else choose another folder"
                ) from None

    def _lock(self) -> bool | None:
        """Whether it is locked now; False: the file system knows no locks; None: the file is there no more."""
        deadline, said = time.monotonic() + self._lease, None
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s: its file system knows no locks; signs of life must do", self.path)
                return False
            before, said = said, self._holder()
            if said is None:
                return None
            if _parsed(said).get("boot") in (None, self._own["boot"]) or before not in (None, said):
                raise self._held(said)
            if before is None:
                log.warning("%s: locked by %s; waiting for a sign of life, or for the lock", self.path, _who(said))
            if time.monotonic() > deadline:
                raise FolderError(
                    f"{self.folder} is locked by {_who(said)}, which has given no sign of life for {self._lease:g} s. "
                    f"If that machine has failed, remove {self.path}; else choose another folder"
                )
            time.sleep(self._beat / 5)

    def _holder(self) -> bytes | None:
        """What the file says, which may just be written."""
        deadline = time.monotonic() + 1
        with contextlib.suppress(OSError):  # some file systems let nobody else read what is locked
            while (said := _read(self.path)) == b"" and time.monotonic() < deadline:
                time.sleep(0.02)
            return said
        return b""

    def _another_ends(self, locked: bool) -> bool:
        """Whether an owner that had not removed the file does so just now. Raises FolderError where one lives, for all
        that the lock says."""
        left = os.pread(self._file, _LARGEST, 0)
        if _token(left) is None or (locked and _parsed(left).get("boot") == self._own["boot"]):
            return False  # nobody's, or of this machine, where the lock has gone with it
        log.warning("%s: left by %s; waiting %g s for a sign of life", self.path, _who(left), self._silence)
        deadline = time.monotonic() + self._silence
        while time.monotonic() < deadline:
            time.sleep(self._beat / 10)
            try:
                said = _read(self.path)
            except PermissionError:  # the lock is so strict that it tells all
                return False
            if said is None:
                return True
            if said != left:
                raise self._held(said)
        log.warning("%s: no sign of life: taken over", self.folder)
        return False

    def _settle(self) -> None:
        """Without a lock two may have come this far at once: the one that wrote last stays."""
        for _ in range(20):
            time.sleep(self._beat * random.uniform(0.5, 1))
            said = _read(self.path)
            if _token(said) == self._own["token"]:
                return
            if _token(said) is not None:
                raise self._held(said)
            self._beats = 0
            self._say()  # two wrote at the same moment, and neither can be read
        raise self._held(said)

    def _held(self, said: bytes | None) -> FolderError:
        return FolderError(
            f"{self.folder} is in use by {_who(said)}. Wait until it has ended, end it, or choose another folder"
        )

    # -- keeping it ----------------------------------------------------------------------------------------------------

    def _say(self) -> None:
        text = json.dumps({**self._own, "beats": self._beats}, indent=1) + "\n"
        if self._beats == 0:
            os.ftruncate(self._file, 0)  # later it grows, if anything, so that what is read is whole
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)  # a network file system would keep it to this machine for a while
        self._beats += 1

    def _keep(self) -> None:
        while not self._ending.wait(self._beat):
            with contextlib.suppress(OSError):  # the file system is away for now
                found = _read(self.path)
                if self._ending.is_set():
                    return
                if found is None:
                    self._put_back()
                elif _token(found) in (None, self._own["token"]):
                    self._beats *= _token(found) is not None  # somebody emptied it: all of it is written anew
                    self._say()
                elif self._intruder is None:
                    self._intruder = found
                elif self._intruder == found:  # a copy of another folder's: nobody stands behind it
                    self._intruder, self._beats = None, 0
                    self._say()
                else:
                    say(f"process {os.getpid()} ends: {self.folder} was taken over by {_who(found)}")
                    os._exit(2)

    def _put_back(self) -> None:
        """Somebody removed the file."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                return  # another process opened it at once: the next look will tell
        os.close(self._file)
        self._file, self._beats = file, 0
        self._say()


def _read(path: Path) -> bytes | None:
    """Opened anew every time: a network file system then asks its server. None: there is none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
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
        return f"another process ({OWNER} there cannot be read)"
    words = {key: str(found.get(key, "unknown")) for key in ("process", "host", "user", "since", "command")}
    words = {key: word if word.isprintable() else ascii(word) for key, word in words.items()}
    return "process {process} on {host} (user {user}, since {since}; its command: {command})".format(**words)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
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
