"""A checkpoint's state back into an engine, whatever the number of ranks that wrote it.

Weights, teacher, queues and every other buffer come from the module's state dict (DeepSpeed's universal checkpoints
drop frozen parameters and buffers without a word), masters and moments from ZeRO's slices, the random number generators
from this rank's file; with another number of ranks the slices are cut anew and the generators seeded anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from torch import Tensor

from albef_ds.training.checkpoint_files import read_tensors
from albef_ds.training.checkpoint_manifest import CheckpointError, Manifest
from albef_ds.training.random_state import derive_random_state, restore_random_state
from albef_ds.training.repartition import FlatLayout, cut_slice
from albef_ds.training.snapshot import copied

log = logging.getLogger(__name__)

MODEL_FILE = "mp_rank_00_model_states.pt"
_MASTERS = "single_partition_of_fp32_groups"


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def zero_file(manifest: Manifest, rank: int) -> str:
    names = (f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for prefix in ("", "bf16_"))
    found = next((name for name in names if name in manifest.files), None)
    if found is None:
        raise CheckpointError(f"the optimiser state of rank {rank} is not among its files")
    return found


def restore(engine: deepspeed.DeepSpeedEngine, folder: Path, manifest: Manifest) -> None:
    """Puts all of it into the engine. Collective.

    Raises:
        CheckpointError: the files hold something else than this model's state.
    """
    if MODEL_FILE not in manifest.files:
        raise CheckpointError(f"{folder}: {MODEL_FILE} is not among its files")
    states = read_tensors(folder / MODEL_FILE)
    try:
        engine.load_module_state_dict(checkpoint=states, strict=True)
        engine.global_steps = states["global_steps"]
        engine.global_samples = states["global_samples"]
        engine.skipped_steps = states["skipped_steps"]
        if engine.zero_optimization():
            of_ranks: list = [None] * dist.get_world_size()  # DeepSpeed reads none but this rank's
            of_ranks[dist.get_rank()] = _zero_state(engine, folder, manifest, states)
            engine.optimizer.load_state_dict(of_ranks, load_from_fp32_weights=True)
        else:
            engine.optimizer.load_state_dict(copied(states["optimizer"], _clone))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from None
    except Exception as error:  # a state of other keys, shapes or types fails anywhere below DeepSpeed
        raise CheckpointError(f"{folder}: cannot be loaded: {type(error).__name__}: {error}") from error
    engine.module.after_load()
    _restore_random(folder, manifest)


def _zero_state(engine, folder: Path, manifest: Manifest, states: Mapping) -> dict[str, Any]:
    """This rank's optimiser state in DeepSpeed's form."""

    @cache
    def state_of(rank: int) -> dict[str, Any]:
        return read_tensors(folder / zero_file(manifest, rank))["optimizer_state_dict"]

    rank, world_size = dist.get_rank(), dist.get_world_size()
    if manifest.world_size == world_size:
        # A copy: DeepSpeed keeps what it is given, and these tensors are pages of a file.
        return copied(state_of(rank), _clone)
    log.info("%s: written by %d ranks: optimiser state cut anew for %d", folder, manifest.world_size, world_size)
    old = [FlatLayout.of(shapes, manifest.world_size) for shapes in states["param_shapes"]]
    new = [FlatLayout.of(shapes, world_size) for shapes in engine._get_zero_param_shapes()]
    expected = [master.numel() for master in engine.optimizer.single_partition_of_fp32_groups]
    if [layout.slice_size for layout in new] != expected:  # a DeepSpeed that pads otherwise
        raise CheckpointError(
            f"DeepSpeed {deepspeed.__version__} lays the optimiser state out in another way: slices of {expected} "
            f"elements instead of {[layout.slice_size for layout in new]}; resume with {manifest.world_size} ranks"
        )
    return repartition(old, new, rank, state_of)


def repartition(
    old: Sequence[FlatLayout], new: Sequence[FlatLayout], rank: int, state_of: Callable[[int], Mapping]
) -> dict[str, Any]:
    """The optimiser state of rank `rank` among the new ranks.

    Args:
        old, new: a layout a parameter group.
        state_of: an old rank to its optimiser state, as DeepSpeed's ZeRO optimiser writes it.

    Raises:
        CheckpointError: other parameter groups, or a layout with padding between parameters.
    """
    any_state = state_of(0)
    base = any_state["base_optimizer_state"]
    if len(old) != len(new) or len(base["param_groups"]) != len(new):
        raise CheckpointError(f"{len(old)} parameter groups, this run has {len(new)}")
    if any(any(group) for group in any_state.get("param_alignment_paddings", ())):
        raise CheckpointError(
            "zero_optimization.parameter_alignment pads every parameter: resume with as many ranks as wrote it"
        )
    moments: dict[int, dict[str, Any]] = {}
    masters: list[Tensor] = []
    for index, (theirs, ours) in enumerate(zip(old, new, strict=True)):
        masters.append(cut_slice(theirs, ours, rank, lambda r, i=index: state_of(r)[_MASTERS][i]))
        parameter = base["param_groups"][index]["params"][0]
        moments[parameter] = {
            name: cut_slice(theirs, ours, rank, lambda r, p=parameter, n=name: _moments(state_of(r))[p][n])
            if isinstance(value, Tensor) and value.ndim == 1
            else copied(value, _clone)  # the number of steps, equal on all ranks
            for name, value in base["state"].get(parameter, {}).items()
        }
    return {
        **any_state,
        "base_optimizer_state": {"state": moments, "param_groups": copied(base["param_groups"], _clone)},
        _MASTERS: masters,
        "group_paddings": [layout.padding(rank) for layout in new],
        "partition_count": [layout.world_size for layout in new],
    }


def _moments(state: Mapping) -> Mapping:
    return state["base_optimizer_state"]["state"]


def _restore_random(folder: Path, manifest: Manifest) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if manifest.world_size == world_size:
        if rank_file(rank) not in manifest.files:
            raise CheckpointError(f"{folder}: {rank_file(rank)} is not among its files")
        try:
            restore_random_state(read_tensors(folder / rank_file(rank)))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{folder / rank_file(rank)}: no state of random numbers: {error}") from error
        return
    seed = manifest.identity.get("train", {}).get("seed", 0)
    derive_random_state(seed, manifest.step, world_size, rank)
    log.warning(
        "%s: written by %d ranks, this run has %d: dropout and negatives are drawn from new random numbers, derived "
        "from seed and step; samples, weights, optimiser, teacher and queues go on as they were",
        *(folder, manifest.world_size, world_size),
    )


def _clone(tensor: Tensor, key: str) -> Tensor:
    return tensor.clone()
