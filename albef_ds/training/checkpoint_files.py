"""The files of a checkpoint: written so that they reach the disk, read so that nothing in them is ever executed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from albef_ds.model.weight_files import archive_fault
from albef_ds.training.checkpoint_manifest import CheckpointError, FileEntry

# What DeepSpeed's optimiser files contain beside tensors; anything else in them is refused.
_ALLOWED = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
)


class _Counted:
    """A file that is hashed while it is written: reading it again would cost a pass over the disk."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data) -> int:
        view = memoryview(data)
        self.digest.update(view)
        written = 0
        while written < len(view):  # a raw file may take less than it is given
            written += self.file.write(view[written:])
        self.size += written
        return written

    def flush(self) -> None:
        self.file.flush()


def write_tensors(state: Mapping, path: Path) -> FileEntry:
    """Writes `state` and waits until it is on the disk; returns size and sha256 of what was meant to be written.

    Raises OSError as it is (no space, no permission, ...): the caller knows what the file is for.
    """
    failed: list[OSError] = []
    try:
        with open(path, "wb", buffering=0) as raw:
            counted = _Counted(_Remembering(raw, failed))
            torch.save(state, counted)
            os.fsync(raw.fileno())
    except Exception:
        if failed:  # PyTorch reports it as "unexpected pos", which tells nobody that the disk is full
            raise failed[0] from None
        raise
    return FileEntry(size=counted.size, sha256=counted.digest.hexdigest())


class _Remembering:
    """Keeps the first OSError of a file, which PyTorch's writer would replace by one of its own."""

    def __init__(self, file: BinaryIO, failed: list[OSError]):
        self.file, self.failed = file, failed

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed.append(error)
            raise

    def flush(self) -> None:
        self.file.flush()


def read_tensors(path: str | Path) -> Any:
    """What `write_tensors` wrote, on the CPU; pages are read from the disk when they are used.

    Raises:
        CheckpointError: not a file of tensors, plain containers and DeepSpeed's few classes. Nothing was executed.
    """
    path = Path(path)
    fault = archive_fault(path)
    if fault:
        raise CheckpointError(f"{path}: not a file of PyTorch's ({fault})")
    classes = [getattr(importlib.import_module(module), name) for module, name in _ALLOWED]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a stranger's file can fail anywhere in PyTorch's reader
        refused = isinstance(error, pickle.UnpicklingError)
        what = "holds what is neither tensor nor plain data" if refused else "cannot be read"
        raise CheckpointError(f"{path}: {what}; nothing was executed ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def sync_folder(folder: Path) -> None:
    """The names of new files must reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path, first: str) -> None:
    """Removes a checkpoint, its file `first` before all others, so that a half-removed one is never taken for whole.
    Of a link to one, the link goes and nothing else."""
    if folder.is_symlink():
        folder.unlink()
        return
    with contextlib.suppress(OSError):
        (folder / first).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def disk_error(error: OSError, folder: Path) -> str:
    """What went wrong and how much room there is, for people: "…/step_00001000: No space left on device (…)"."""
    where = Path(error.filename).name if isinstance(error.filename, str | os.PathLike) else ""
    text = f"{folder}: {where + ': ' if where and where != folder.name else ''}{error.strerror or error}"
    return f"{text} ({free_space(folder)})"


def free_space(folder: Path) -> str:
    """ "12.3 of 500 GB free", of the nearest folder that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return "free space unknown"
    return f"{usage.free / 1e9:.4g} of {usage.total / 1e9:.4g} GB free"
