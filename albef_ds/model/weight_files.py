"""Reads files of weights: nothing is unpickled but tensors and plain containers."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names it and says what was expected."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A .pth/.bin/.pt (bare or under "model"/"state_dict") or .safetensors file, on the CPU.

    Raises:
        WeightsError: not there, not a weights file, or one that would run code when unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        loaded = _load(path)
    except Exception as error:  # a stranger's file can fail anywhere in the two libraries
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        if path.suffix == ".safetensors":
            raise WeightsError(f"{path}: not a safetensors file ({reason})") from None
        raise WeightsError(
            f"{path}: not a file of plain tensors ({reason}). Nothing was executed; save it again as a state dict"
        ) from None
    for key in ("model", "state_dict", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise WeightsError(f"{path}: holds no named tensors; expected a state dict, or one under the key 'model'")
    return tensors


def _load(path: Path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # how PyTorch tells; its older form is one pickle after another
    if is_archive and (fault := archive_fault(path)):
        raise ValueError(fault)
    return torch.load(path, map_location="cpu", weights_only=True)


def archive_fault(path: Path) -> str | None:
    """Why this is none of PyTorch's archives, which are not compressed: a compressed entry could unpack to any size."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # a stranger's archive fails in many ways
        return (str(error) or type(error).__name__).splitlines()[0][:200]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        return "its contents are compressed"
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        return "a program (TorchScript), not tensors"
    return None


def few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
