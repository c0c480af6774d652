"""Checkpoints that are whole or are not there, and a resume that goes on bit by bit where the run stopped.

    checkpoints/step_00001000/
        mp_rank_00_model_states.pt, *_optim_states.pt   DeepSpeed's: weights, teacher, queues, masters, moments
        rank_00000.pt ...                               each rank's random number generators
        manifest.json                                   step, versions, sizes and sha256 of all files; written last

A save copies the state to host memory, which is all that training waits for; a CheckpointWriter does the rest in the
background. A folder without a manifest, or one whose files do not match it, is no checkpoint. Nothing read here is
unpickled beyond tensors, plain containers and a short list of DeepSpeed's own classes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import albef_ds
from albef_ds.config import CheckpointConfig
from albef_ds.training.agreement import from_rank_zero
from albef_ds.training.checkpoint_manifest import (
    SCHEMA,
    CheckpointError,
    FileEntry,
    Manifest,
    config_hash,
    differences,
    read_manifest,
    verify,
)
from albef_ds.training.checkpoint_writer import CheckpointWriter, SaveTiming
from albef_ds.training.random_state import random_state
from albef_ds.training.restore import rank_file, restore
from albef_ds.training.resume_point import newest_usable
from albef_ds.training.retention import step_folder
from albef_ds.training.snapshot import Snapshots
from albef_ds.training.upload import Uploader

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks alike.

    Args:
        folder: holds a folder a checkpoint.
        settings: how many stay, what to do when the disk fails, where copies go.
        identity: what must be equal for a resume to make sense (parts of the configuration); stored and compared.
        config: the whole configuration, stored.
        verified: a folder whose files are known to match its manifest: they are not read again.
        wait: seconds before the first further attempt after a failure; doubled every time.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: CheckpointConfig,
        identity: Mapping,
        config: Mapping | None = None,
        verified: Path | None = None,
        wait: float = 1.0,
    ):
        self.folder = Path(folder)
        self.settings = settings
        self.identity = json.loads(json.dumps(identity))
        self.config = None if config is None else json.loads(json.dumps(config))
        self._snapshots = Snapshots()
        self._saved: int | None = None
        self.verified = verified
        self._uploader: Uploader | None = None
        if settings.upload and dist.get_rank() == 0:
            self._uploader = Uploader(settings.upload, settings.keep, settings.keep_every, settings.retries, wait)
        self._writer = CheckpointWriter(self.folder, settings, self._manifest, self._uploader, wait)

    @property
    def timings(self) -> list[SaveTiming]:
        return self._writer.timings

    @property
    def skipped(self) -> list[int]:
        """Steps whose checkpoint could not be written, the run going on."""
        return self._writer.skipped

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, engine: deepspeed.DeepSpeedEngine, step: int) -> Path:
        """Takes the state after `step` optimiser steps and leaves the writing to a thread; waits for the writing of the
        checkpoint before. A step that this run has saved already is not saved again.

        Raises:
            CheckpointError: an earlier one could not be written, and checkpoint.on_error says to stop.
        """
        target = self.folder / step_folder(step)
        if step == self._saved:
            return target
        start = time.perf_counter()
        self.wait()
        if (waited := time.perf_counter() - start) > 1:
            log.warning("training waited %.3g s until the checkpoint before was written; save less often", waited)
        files = self._snapshots.take(engine, {rank_file(dist.get_rank()): random_state()})
        self._saved = step
        self._writer.begin(files, step, start)
        if not self.settings.background:
            self.wait()
        return target

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and checkpoint.on_error says to stop. Ranks hear of it at different
        moments: where one has, let all of them `give_up` at the same step."""
        return self._writer.failed

    def give_up(self) -> None:
        """Raises CheckpointError: what could not be written, and why."""
        self._writer.give_up()

    def wait(self) -> None:
        """Until what was begun is on the disk; raises CheckpointError where it could not be written."""
        self._writer.wait()

    def finish(self) -> None:
        """Call at the end of training: waits for the last checkpoint and its upload."""
        self.wait()
        if self._uploader is not None:
            self._uploader.finish()

    def _manifest(self, step: int, files: Mapping[str, FileEntry]) -> Manifest:
        return Manifest(
            schema=SCHEMA,
            step=step,
            world_size=dist.get_world_size(),
            identity=self.identity,
            versions={
                "albef_ds": albef_ds.__version__,
                "torch": str(torch.__version__),
                "deepspeed": deepspeed.__version__,
            },
            files=dict(sorted(files.items())),
            config=self.config,
            config_sha256=None if self.config is None else config_hash(self.config),
        )

    # -- resuming ------------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest checkpoint whose files all match its manifest, fetched from checkpoint.upload where there is none
        here; what is wrong with newer ones is logged. Rank 0 looks, all ranks get its answer.

        Raises:
            CheckpointError: there is none here, and the URL cannot be read.
        """
        self.wait()
        found = from_rank_zero(lambda: newest_usable(self.folder, self.settings.upload)[0], CheckpointError)
        self.verified = found or self.verified
        return found

    def load(self, engine: deepspeed.DeepSpeedEngine, folder: Path) -> int:
        """Restores everything and returns the number of steps done; the number of ranks may be another.

        Raises:
            CheckpointError: damaged, or of another model or run.
        """
        manifest = self._checked(folder)
        differing = differences(manifest.identity, self.identity)
        if differing:
            raise CheckpointError(f"{folder}: a checkpoint of another configuration: {'; '.join(differing[:6])}")
        if manifest.config is not None and self.config is not None:
            if changed := differences(manifest.config, self.config):
                log.info("configuration changed since %s was written: %s", folder.name, "; ".join(changed[:12]))
        restore(engine, folder, manifest)
        self._saved = manifest.step if folder.parent == self.folder else None
        self._writer.new_course = True
        return manifest.step

    def _checked(self, folder: Path) -> Manifest:
        """Its manifest; its files are checked by rank 0, unless that has just been done."""
        if folder != self.verified:
            from_rank_zero(lambda: verify(folder) and None, CheckpointError)
        return read_manifest(folder)
