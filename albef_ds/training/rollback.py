"""Goes back to the last checkpoint before a loss spike (albef_ds.training.spikes says when)."""

from __future__ import annotations

import logging
from pathlib import Path

import deepspeed
import torch.distributed as dist

from albef_ds.training.checkpoint import Checkpoints
from albef_ds.training.checkpoint_manifest import CheckpointError, verify
from albef_ds.training.retention import complete_folders, set_aside
from albef_ds.training.spikes import PassedOver, RollBack, SpikeError

log = logging.getLogger(__name__)


def roll_back(
    engine: deepspeed.DeepSpeedEngine, checkpoints: Checkpoints, spike: RollBack, passed_over: PassedOver, limit: int
) -> int:
    """Collective. Restores the state before the spike, passes over its samples, and returns the steps done.

    Later checkpoints are set aside: a resume must not start from the spike.

    Raises:
        SpikeError: there is no checkpoint from before, or the run was rolled back `limit` times already.
    """
    if len(passed_over.rollbacks) >= limit:
        raise SpikeError(
            f"{spike}, and the run went back {limit} times already (faults.rollback_max); what was passed over is "
            f"in {passed_over.path}. Lower optimizer.lr or set train.clip"
        )
    checkpoints.finish()
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        found[0] = _last_before(spike, checkpoints.folder)
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        raise SpikeError(
            f"{spike}, and no checkpoint from before step {spike.first + 1} is in {checkpoints.folder}; lower "
            "checkpoint.every or raise checkpoint.keep, or set faults.rollback to false"
        )
    passed_over.add(spike, Path(found[0]).name, write=dist.get_rank() == 0)
    step = checkpoints.load(engine, Path(found[0]))
    log.warning("%s: back to %s, past its samples", spike, found[0])
    return step


def _last_before(spike: RollBack, folder: Path) -> str | None:
    set_aside(folder, spike.first + 1)
    for checkpoint in complete_folders(folder):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
            continue
        return str(checkpoint)
    return None
