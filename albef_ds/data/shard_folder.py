"""A folder of shards, here or behind a URL, and a local cache of bounded size for the latter.

Any URL that fsspec knows will do (https://, s3://, gs://, …); what a scheme needs beyond fsspec, its error says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from albef_ds.data.files import open_ordinary
from albef_ds.data.shard_format import ShardError

_OPEN_FILES = 128
_ATTEMPTS = 4
_CHUNK = 4 << 20
_LARGEST_READ = 1 << 30  # bytes of a manifest or an index; that of ten million samples has half of it
_ABANDONED = 3600  # seconds without a byte: whoever fetched it was killed


def open_folder(location: str, cache_dir: str | os.PathLike | None = None, cache_bytes: int = 50 << 30) -> ShardFolder:
    """The folder at a path or URL. Raises ShardError where a URL is given and no `cache_dir`."""
    if "://" not in location:
        return LocalFolder(location)
    if cache_dir is None:
        raise ShardError(
            f"{location}: a URL needs a local folder for its shards; set data.cache_dir (and data.cache_gb)"
        )
    return CachedFolder(location, Path(cache_dir), cache_bytes)


class ShardFolder(ABC):
    """Reads files of one folder by name. All errors are ShardErrors that name the file."""

    location: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a small file: a manifest or an index."""

    @abstractmethod
    def read_at(self, name: str, offset: int, count: int, size: int, sha256: str) -> bytes:
        """`count` bytes of a shard that has `size` bytes and this checksum."""

    def size(self, name: str) -> int | None:
        """In bytes where that is known without fetching anything; raises ShardError where the file is missing."""
        return None

    def name_of(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}"


class _Open:
    """A file that closes when nobody uses it any more, in whichever thread that is."""

    def __init__(self, path: str | os.PathLike):
        self.descriptor = open_ordinary(path)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self):
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.descriptor)

    def read_at(self, offset: int, count: int) -> bytes:
        """Fewer bytes where the file ends before; no more memory is taken than it has."""
        return os.pread(self.descriptor, max(0, min(count, self.size - offset)), offset)


class LocalFolder(ShardFolder):
    def __init__(self, location: str):
        self.location = location
        self._files: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):  # for a spawned loader worker
        return {"location": self.location}

    def __setstate__(self, state):
        self.__init__(**state)

    def read(self, name: str) -> bytes:
        with self._named(name), open(Path(self.location, name), "rb", opener=open_ordinary) as file:
            return _limited(file.read(_LARGEST_READ + 1), self.name_of(name))

    def read_at(self, name: str, offset: int, count: int, size: int, sha256: str) -> bytes:
        with self._named(name):
            with self._lock:
                file = self._files.get(name)
                if file is None:
                    file = self._files[name] = _Open(Path(self.location, name))
                self._files.move_to_end(name)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            return _whole(file.read_at(offset, count), count, self.name_of(name))

    def size(self, name: str) -> int:
        with self._named(name):
            found = os.stat(Path(self.location, name))
        if not stat.S_ISREG(found.st_mode):
            raise ShardError(f"{self.name_of(name)}: not an ordinary file")
        return found.st_size

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise ShardError(f"{self.name_of(name)}: missing") from None
        except OSError as error:
            raise ShardError(f"{self.name_of(name)}: cannot be read: {error.strerror or error}") from error


class CachedFolder(ShardFolder):
    """Fetches a shard the first time a byte of it is asked for, and keeps as many as fit, the latest used.

    Several processes may share `cache_dir`: each shard is fetched by one of them. What is fetched must have the
    manifest's size and sha256, so that a transfer cut short is never taken for a shard.
    """

    def __init__(self, location: str, cache_dir: Path, cache_bytes: int):
        self.location, self.cache_dir, self.cache_bytes = location, Path(cache_dir), cache_bytes
        self.fetched = 0  # shards, by this process
        self._prefix = hashlib.sha256(location.encode()).hexdigest()[:12]
        self.cache_dir.mkdir(parents=True, exist_ok=True)

    def __getstate__(self):
        return {"location": self.location, "cache_dir": self.cache_dir, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state):
        self.__init__(**state)

    def read(self, name: str) -> bytes:
        with self._remote(name) as file:
            return _limited(file.read(_LARGEST_READ + 1), self.name_of(name))

    def read_at(self, name: str, offset: int, count: int, size: int, sha256: str) -> bytes:
        for _ in range(_ATTEMPTS):
            try:
                data = _Open(self.fetch(name, size, sha256)).read_at(offset, count)
            except FileNotFoundError:
                continue  # another process needed the room just now
            except OSError as error:
                raise ShardError(f"{self.name_of(name)}: its copy in {self.cache_dir}: {error.strerror}") from error
            return _whole(data, count, self.name_of(name))
        raise ShardError(f"{self.cache_dir}: shards are thrown out before they are read; raise data.cache_gb")

    def fetch(self, name: str, size: int, sha256: str) -> Path:
        """The path of the shard's copy, fetched where it is not there."""
        path = self.cache_dir / f"{self._prefix}-{sha256[:16]}-{name}"
        if self._touch(path):
            return path
        with _locked(self.cache_dir / f".{path.name}.lock"):
            if not self._touch(path):  # another process may have fetched it meanwhile
                temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
                try:
                    self._make_room(temporary, size, name)
                    self._download(name, temporary, size, sha256)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
                self.fetched += 1
        return path

    @staticmethod
    def _touch(path: Path) -> bool:
        """Whether it is there; it then counts as just used."""
        try:
            if time.time() - os.stat(path).st_mtime > 1:
                os.utime(path)
            return True
        except FileNotFoundError:
            return False

    def _make_room(self, temporary: Path, size: int, name: str) -> None:
        """Takes `size` bytes for a file that is to come, at the cost of the shards that were used longest ago."""
        if size > self.cache_bytes:
            raise ShardError(
                f"{self.name_of(name)}: {size:,} bytes do not fit a cache of {self.cache_bytes:,}; raise data.cache_gb"
            )
        with _locked(self.cache_dir / ".room.lock"):
            held = []
            for path in self.cache_dir.glob("*-shard-*.tar*"):
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    held.append((found.st_mtime, found.st_size, path))
            total = sum(bytes_ for _, bytes_, _ in held) + size
            for used, bytes_, path in sorted(held):
                abandoned = path.suffix != ".tar" and time.time() - used > _ABANDONED
                if abandoned or (path.suffix == ".tar" and total > self.cache_bytes):
                    path.unlink(missing_ok=True)
                    (self.cache_dir / f".{path.name}.lock").unlink(missing_ok=True)
                    total -= bytes_
            with open(temporary, "wb") as file:
                file.truncate(size)  # the next process to look must count it

    def _download(self, name: str, temporary: Path, size: int, sha256: str) -> None:
        digest, got = hashlib.sha256(), 0
        with self._remote(name) as source, open(temporary, "r+b") as target:
            while got <= size and (block := source.read(_CHUNK)):
                got += target.write(block)
                digest.update(block)
        if got != size or digest.hexdigest() != sha256:
            what = f"{got:,} bytes instead of {size:,}" if got < size else "contents have changed (sha256 differs)"
            raise ShardError(f"{self.name_of(name)}: {what}")

    @contextlib.contextmanager
    def _remote(self, name: str):
        try:
            import fsspec

            with fsspec.open(self.name_of(name), "rb") as file:
                yield file
        except FileNotFoundError:
            # fsspec says the same of both
            raise ShardError(f"{self.name_of(name)}: missing, or its server cannot be reached") from None
        except ShardError:
            raise
        except Exception as error:  # every protocol has errors of its own
            raise ShardError(f"{self.name_of(name)}: cannot be fetched: {error or type(error).__name__}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _limited(data: bytes, name: str) -> bytes:
    if len(data) > _LARGEST_READ:
        raise ShardError(f"{name}: larger than {_LARGEST_READ:,} bytes: neither manifest nor index")
    return data


def _whole(data: bytes, count: int, name: str) -> bytes:
    if len(data) != count:
        raise ShardError(f"{name}: cut short")
    return data
