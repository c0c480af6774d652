"""Reads files of weights: nothing is unpickled but tensors and plain containers."""

from __future__ import annotations

import pickle
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
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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


def few(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
