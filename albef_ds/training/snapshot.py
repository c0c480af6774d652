"""A copy in host memory of everything a checkpoint holds, so that training goes on while it is written.

DeepSpeed decides what belongs to a checkpoint: `engine.save_checkpoint` runs with a writer that keeps copies instead of
writing. The copies live in buffers that the next snapshot uses again, pinned where they come from a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch import Tensor

TensorCopy = Callable[[Tensor, str], Tensor]


class Snapshots:
    """Takes snapshots of one engine; only one is alive at a time, since they share their buffers."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def take(self, engine: deepspeed.DeepSpeedEngine, extra: Mapping[str, Mapping]) -> dict[str, Any]:
        """File names to states, of this rank: DeepSpeed's and `extra`. Collective; nothing touches the disk."""
        files: dict[str, Any] = {}
        devices: set[torch.device] = set()

        def keep(name: str, state: Mapping) -> None:
            files[name] = copied(state, lambda tensor, key: self._copy(tensor, f"{name}/{key}", devices))

        engine.checkpoint_engine = _Capture(keep)
        engine._copy_recovery_script = lambda folder: None  # a script of DeepSpeed's; `checkpoint export` does its work
        engine.save_checkpoint("snapshot", tag="snapshot", save_latest=False)
        for name, state in extra.items():
            keep(name, state)
        for device in devices:
            torch.cuda.synchronize(device)
        return files

    def _copy(self, tensor: Tensor, key: str, devices: set[torch.device]) -> Tensor:
        tensor = tensor.detach()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[key] = _host_buffer(tensor)
        on_gpu = tensor.device.type == "cuda"
        buffer.copy_(tensor, non_blocking=on_gpu)
        if on_gpu:
            devices.add(tensor.device)
        return buffer


def _host_buffer(tensor: Tensor) -> Tensor:
    shape = {"size": tuple(tensor.shape), "dtype": tensor.dtype, "device": "cpu"}
    if tensor.device.type != "cuda":
        return torch.empty(**shape)
    try:
        return torch.empty(**shape, pin_memory=True)
    except RuntimeError:  # the machine allows no more locked memory: slower, not wrong
        return torch.empty(**shape)


def copied(value: Any, copy_tensor: TensorCopy, key: str = "") -> Any:
    """A deep copy of nested containers, tensors by `copy_tensor(tensor, path within)`."""
    if isinstance(value, Tensor):
        return copy_tensor(value, key)
    if isinstance(value, dict):
        pairs = ((k, copied(v, copy_tensor, f"{key}/{k}")) for k, v in value.items())
        twin = type(value)(pairs)
        if hasattr(value, "_metadata"):  # versions of modules, which PyTorch keeps beside a state dict
            twin._metadata = value._metadata
        return twin
    if type(value) in (list, tuple):
        return type(value)(copied(v, copy_tensor, f"{key}/{i}") for i, v in enumerate(value))
    return copy.deepcopy(value)


class _Capture(TorchCheckpointEngine):
    """What DeepSpeed takes for its writer."""

    def __init__(self, keep: Callable[[str, Mapping], None]):
        super().__init__()
        self.keep = keep

    def create(self, info):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def save(self, state_dict, path: str):
        self.keep(Path(path).name, state_dict)

    def load(self, path: str, map_location=None):
        raise NotImplementedError("checkpoints are read by albef_ds.training.restore")

    def commit(self, info):
        return True
