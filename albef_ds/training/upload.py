"""Copies of complete checkpoints elsewhere (s3://, gs://, file://, … whatever fsspec knows), and back again.

The manifest is copied last and removed first, so that at any moment a remote folder with a manifest is whole. Uploading
has a thread of its own and never holds up training; what could not be copied is said, and the next one is tried.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from pathlib import Path

from albef_ds.training.checkpoint_files import free_space, remove_folder, sync_folder
from albef_ds.training.checkpoint_manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    parse_manifest,
    read_manifest,
    sha256_of,
)
from albef_ds.training.retention import step_of, superfluous

log = logging.getLogger(__name__)

FETCHING = ".fetching_"  # before the name of a checkpoint that is on its way here
_BLOCK = 4 << 20
_LONGEST_WAIT = 60.0  # seconds between two attempts


def open_remote(url: str):
    """(file system, path) of a URL. Raises CheckpointError where fsspec or the protocol's package is missing."""
    try:
        import fsspec
    except ImportError:
        raise CheckpointError(f"{url}: needs the package fsspec: pip install 'albef_ds[remote]'") from None
    try:
        files, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # every protocol has errors of its own
        raise CheckpointError(f"{url}: cannot be opened: {error}") from None
    files.use_listings_cache = False
    return files, path.rstrip("/")


class Uploader:
    """Copies one checkpoint after the other, in the background; where it falls behind, the newest one goes first.

    Args:
        url: gets a folder a checkpoint; one URL a run.
        keep, keep_every: which stay there, by the same rules as here.
        retries: further attempts for each checkpoint, after 1, 2, 4, … times `wait` seconds.
    """

    def __init__(self, url: str, keep: int, keep_every: int | None, retries: int, wait: float = 1.0):
        self.url, self.keep, self.keep_every, self.retries, self.wait = url, keep, keep_every, retries, wait
        self.files, self.path = open_remote(url)
        self.failed: list[str] = []  # what was given up, as messages
        self._next: Path | None = None
        self._current: Path | None = None
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> list[Path]:
        """Folders that are being copied: not to be removed now."""
        with self._lock:
            return [path for path in (self._current, self._next) if path is not None]

    def submit(self, folder: Path) -> None:
        """Returns at once."""
        with self._lock:
            if self._next is not None:
                log.warning("%s: not copied to %s: a newer one is ready first", self._next, self.url)
            self._next = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint upload")
                self._thread.start()

    def finish(self) -> None:
        """Waits until everything that was submitted is there, or given up."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._current, self._next = self._next, None
                if self._current is None:
                    self._thread = None
                    return
            self._copy_with_retries(self._current)

    def _copy_with_retries(self, folder: Path) -> None:
        for attempt in range(self.retries + 1):
            try:
                self._copy(folder)
                log.info("%s: copied to %s", folder, self.url)
                self._prune()
                return
            except Exception as error:  # every protocol has errors of its own; none may end the run
                message = f"{folder}: cannot be copied to {self.url}: {type(error).__name__}: {error}"
                if attempt == self.retries:
                    self.failed.append(message)
                    log.error("%s; given up after %d attempts, training goes on", message, attempt + 1)
                    return
                delay = min(self.wait * 2**attempt, _LONGEST_WAIT)
                log.warning("%s; again in %.3g s", message, delay)
                time.sleep(delay)

    def _copy(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        target = f"{self.path}/{folder.name}"
        self.files.makedirs(target, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(f"{target}/{MANIFEST}")  # of an earlier course of the run
        for name in (*manifest.files, MANIFEST):
            self.files.put_file(str(folder / name), f"{target}/{name}")

    def _prune(self) -> None:
        steps = {step_of(name): name for name in complete_remote(self.files, self.path)}
        for step in superfluous(steps, self.keep, self.keep_every):
            folder = f"{self.path}/{steps[step]}"
            self.files.rm_file(f"{folder}/{MANIFEST}")
            self.files.rm(folder, recursive=True)


def complete_remote(files, path: str) -> list[str]:
    """Names of the remote folders that have a manifest, newest first."""
    try:
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(path, detail=False)]
    except FileNotFoundError:
        return []
    names = [name for name in names if step_of(name) is not None and files.exists(f"{path}/{name}/{MANIFEST}")]
    return sorted(names, key=step_of, reverse=True)


def download_newest(url: str, folder: Path) -> tuple[Path | None, list[str]]:
    """Fetches the newest checkpoint of `url` whose files match its manifest into `folder`.

    Returns:
        where it is now, and what is wrong with those that are newer; None, []: there is no checkpoint at all.

    Raises:
        CheckpointError: the URL cannot be read.
    """
    files, path = open_remote(url)
    try:
        names = complete_remote(files, path)
    except Exception as error:
        raise CheckpointError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error
    for left in folder.glob(f"{FETCHING}*"):  # of a start that was killed
        shutil.rmtree(left, ignore_errors=True)
    faults: list[str] = []
    for name in names:
        try:
            found = download(files, f"{path}/{name}", folder / name, f"{url.rstrip('/')}/{name}")
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            log.warning("%s; trying the one before", fault)
        return found, faults
    return None, faults


def download(files, remote: str, target: Path, source: str) -> Path:
    """One remote checkpoint to `target`, its manifest last. `source` names it in errors, which are CheckpointErrors.

    What is at `target`, a damaged one, goes when all is fetched, and stays where that fails.
    """
    part = target.with_name(f"{FETCHING}{target.name}")
    try:
        with files.open(f"{remote}/{MANIFEST}", "rb") as file:
            text = file.read((64 << 20) + 1)
        manifest = parse_manifest(text, f"{source}/{MANIFEST}")
        part.mkdir(parents=True)
        size = f"{manifest.total_bytes:,} bytes"
        if shutil.disk_usage(part).free < manifest.total_bytes:
            raise CheckpointError(f"{source}: {size} do not fit {target} ({free_space(part)})")
        for name, entry in manifest.files.items():
            with files.open(f"{remote}/{name}", "rb") as file:
                _save(file, part / name, entry.size)
        _check(part, manifest, source)
        (part / MANIFEST).write_bytes(text)
        sync_folder(part)
        remove_folder(target, first=MANIFEST)
        part.rename(target)
        sync_folder(target.parent)
        return target
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{source}: cannot be fetched: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _save(source, path: Path, limit: int) -> None:
    """No more than the manifest says plus one block: a server may send without end."""
    got = 0
    with open(path, "wb") as target:
        while got <= limit and (block := source.read(_BLOCK)):
            got += target.write(block)


def _check(target: Path, manifest: Manifest, source: str) -> None:
    for name, entry in manifest.files.items():
        size = (target / name).stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{source}/{name}: {size} bytes instead of {entry.size}")
        if sha256_of(target / name) != entry.sha256:
            raise CheckpointError(f"{source}/{name}: contents have changed (sha256 differs from {entry.sha256})")
