"""Checkpoints that are whole or are not there, and a resume that goes on bit by bit where the run stopped.

    checkpoints/step_00001000/
        mp_rank_00_model_states.pt, *_optim_states.pt   DeepSpeed's: weights, teacher, queues, masters, moments
        rank_00000.pt ...                               each rank's random number generators
        manifest.json                                   step, sizes and sha256 of all files; written last, by rename

A folder without a manifest, or one whose files do not match it, is no checkpoint. Nothing read here is unpickled
beyond tensors, plain containers and a short list of DeepSpeed's own classes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from albef_ds.data.files import write_atomically

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA = 1

# What DeepSpeed's optimiser files contain beside tensors; anything else in them is refused.
_ALLOWED = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the folder and the file."""


class _SafeCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's reader and writer, but it unpickles only the allowed classes, and its files reach the disk."""

    def save(self, state_dict, path: str):
        with open(path, "wb") as file:
            torch.save(state_dict, file)
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: str, map_location=None):
        classes = [getattr(importlib.import_module(module), name) for module, name in _ALLOWED]
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location=map_location, weights_only=True)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds a folder a checkpoint.
        keep: how many complete ones stay.
        identity: what must be equal for a resume to make sense (parts of the configuration); stored and compared.
    """

    def __init__(self, folder: str | Path, keep: int, identity: Mapping):
        self.folder = Path(folder)
        self.keep = keep
        self.identity = json.loads(json.dumps(identity))

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int) -> Path:
        """Writes the state after `step` optimiser steps; collective. Then the oldest beyond `keep` go."""
        target = self.folder / f"step_{step:08d}"
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)  # an incomplete one of a killed run
        dist.barrier()
        engine.checkpoint_engine = _SafeCheckpointEngine()
        engine.save_checkpoint(str(self.folder), tag=target.name, save_latest=False)
        _write_tensors(random_state(), target / f"rank_{dist.get_rank():05d}.pt")
        dist.barrier()  # every rank's files are on disk; only now may the manifest say so
        files = _hash_shared(target)
        if dist.get_rank() == 0:
            self._commit(target, step, files)
            self._prune()
        dist.barrier()
        return target

    def _commit(self, target: Path, step: int, files: Mapping) -> None:
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "world_size": dist.get_world_size(),
            "identity": self.identity,
            "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
            "files": files,
        }
        write_atomically(target / MANIFEST, json.dumps(manifest, indent=1))

    def _prune(self) -> None:
        for old in self._steps()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """Folders with a manifest, newest first."""
        return sorted((p.parent for p in self.folder.glob(f"step_*/{MANIFEST}")), reverse=True)

    def newest(self) -> Path | None:
        """The newest checkpoint whose files all match its manifest; what is wrong with newer ones is logged. Rank 0
        looks, all ranks get its answer."""
        found: list[str | None] = [None]
        if dist.get_rank() == 0:
            for unfinished in sorted(self.folder.glob("step_*"), reverse=True):
                if not (unfinished / MANIFEST).exists():
                    log.warning("%s: incomplete (no manifest): ignored", unfinished)
            for folder in self._steps():
                try:
                    verify(folder)
                except CheckpointError as error:
                    log.warning("%s; trying the one before", error)
                    continue
                found[0] = str(folder)
                break
        dist.broadcast_object_list(found, src=0)
        return Path(found[0]) if found[0] else None

    def load(self, engine: deepspeed.DeepSpeedEngine, folder: Path) -> int:
        """Restores everything and returns the number of steps done.

        Raises:
            CheckpointError: damaged, of another model, or of another number of ranks.
        """
        manifest = read_manifest(folder)
        if manifest["world_size"] != dist.get_world_size():
            raise CheckpointError(
                f"{folder}: written by {manifest['world_size']} ranks, this run has {dist.get_world_size()}; "
                "resume with as many as it was written by"
            )
        differing = _differences(manifest["identity"], self.identity)
        if differing:
            raise CheckpointError(f"{folder}: a checkpoint of another configuration: {'; '.join(differing[:6])}")
        engine.checkpoint_engine = _SafeCheckpointEngine()
        try:
            path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except Exception as error:
            raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found nothing to load in it")
        engine.module.after_load()
        restore_random_state(torch.load(folder / f"rank_{dist.get_rank():05d}.pt", weights_only=True))
        return int(manifest["step"])


# -- manifests ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict:
    """Raises CheckpointError where there is none, or none that this version understands."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no complete checkpoint ({MANIFEST} is missing)") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: not a manifest of schema {SCHEMA}")
    return manifest


def verify(folder: Path) -> dict:
    """Checks size and sha256 of every file; returns the manifest, raises CheckpointError naming the first bad file."""
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes instead of {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: contents have changed (sha256 differs)")
    return manifest


def _hash_shared(folder: Path) -> dict[str, dict]:
    """{"name": {"size", "sha256"}} of all files; the ranks share the work."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    mine = names[dist.get_rank() :: dist.get_world_size()]
    hashed = {n: {"size": (folder / n).stat().st_size, "sha256": _sha256(folder / n)} for n in mine}
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, hashed)
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _differences(theirs, ours, prefix: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [d for k in keys for d in _differences(theirs.get(k), ours.get(k), f"{prefix}.{k}" if prefix else k)]
    return [] if theirs == ours else [f"{prefix} was {theirs!r}, is {ours!r}"]


# -- random numbers ----------------------------------------------------------------------------------------------------


def random_state() -> dict:
    """All generators that a step may draw from, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def restore_random_state(state: Mapping) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002


def _write_tensors(state: Mapping, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
