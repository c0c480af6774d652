"""Checkpoints that are whole or are not there, and a resume that goes on bit by bit where the run stopped.

    checkpoints/step_00001000/
        mp_rank_00_model_states.pt, *_optim_states.pt   DeepSpeed's: weights, teacher, queues, masters, moments
        rank_00000.pt ...                               each rank's random number generators
        manifest.json                                   step, versions, sizes and sha256 of all files; written last

A save copies the state to host memory, which is all that training waits for; a thread of every rank then writes its
files, and rank 0's, once all have said that theirs are on the disk, the manifest. A folder without a manifest, or one
whose files do not match it, is no checkpoint. Nothing read here is unpickled beyond tensors, plain containers and a
short list of DeepSpeed's own classes.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import albef_ds
from albef_ds.config import CheckpointConfig
from albef_ds.data.files import write_atomically
from albef_ds.training.checkpoint_files import disk_error, free_space, sync_folder, write_tensors
from albef_ds.training.checkpoint_manifest import (
    MANIFEST,
    SCHEMA,
    CheckpointError,
    FileEntry,
    Manifest,
    check_size,
    config_hash,
    differences,
    read_manifest,
    verify,
)
from albef_ds.training.random_state import random_state
from albef_ds.training.restore import rank_file, restore
from albef_ds.training.retention import complete_folders, prune, set_aside, step_folder, step_folders
from albef_ds.training.snapshot import Snapshots
from albef_ds.training.upload import Uploader, download_newest

log = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=6)  # for the slowest rank's disk
_LONGEST_WAIT = 60.0  # seconds between two attempts


@dataclass(frozen=True)
class SaveTiming:
    """What one checkpoint cost: `blocked_s` of training's time, `write_s` in the background, this rank's `bytes`."""

    step: int
    blocked_s: float
    write_s: float
    bytes: int


class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks alike.

    Args:
        folder: holds a folder a checkpoint.
        settings: how many stay, what to do when the disk fails, where copies go.
        identity: what must be equal for a resume to make sense (parts of the configuration); stored and compared.
        config: the whole configuration, stored.
        wait: seconds before the first further attempt after a failure; doubled every time.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: CheckpointConfig,
        identity: Mapping,
        config: Mapping | None = None,
        wait: float = 1.0,
    ):
        self.folder = Path(folder)
        self.settings = settings
        self.identity = json.loads(json.dumps(identity))
        self.config = None if config is None else json.loads(json.dumps(config))
        self.first_wait = wait
        self.timings: list[SaveTiming] = []
        self.skipped: list[int] = []  # steps whose checkpoint could not be written, the run going on
        self._snapshots = Snapshots()
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        self._stop_at = 0
        self._reached = 0  # step of the main loop; the writers agree by it when to stop
        self._saved: int | None = None
        self._new_course = True  # later checkpoints that are there already are not of the course that this run takes
        self._verified: Path | None = None
        self._uploader: Uploader | None = None
        if settings.upload and dist.get_rank() == 0:
            self._uploader = Uploader(settings.upload, settings.keep, settings.keep_every, settings.retries, wait)

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
        if self._group is None and dist.get_world_size() > 1:
            # Of its own: the threads of the ranks talk while training's collectives are under way.
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        files = self._snapshots.take(engine, {rank_file(dist.get_rank()): random_state()})
        self._saved = step
        # No daemon: a run that ends in an error still finishes the checkpoint that it has begun.
        arguments = (files, step, time.perf_counter() - start)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()
        if not self.settings.background:
            self.wait()
        return target

    def check(self, step: int) -> None:
        """Once a step, costs nothing. Raises CheckpointError soon after a checkpoint could not be written, at the same
        step on all ranks, where checkpoint.on_error says to stop."""
        self._reached = step
        if self._failure and step >= self._stop_at:
            self._raise()

    def wait(self) -> None:
        """Until what was begun is on the disk; raises CheckpointError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def finish(self) -> None:
        """Call at the end of training: waits for the last checkpoint and its upload."""
        self.wait()
        if self._uploader is not None:
            self._uploader.finish()

    def _raise(self) -> None:
        if self._failure:
            raise CheckpointError(self._failure)

    # -- in the writer's thread ----------------------------------------------------------------------------------------

    def _write(self, files: Mapping[str, Any], step: int, blocked: float) -> None:
        start = time.perf_counter()
        try:
            if size := self._write_with_retries(files, step):
                took = time.perf_counter() - start
                blocked += 0 if self.settings.background else took
                self.timings.append(SaveTiming(step, blocked, took, size))
                log.info("checkpoint of step %d: written in %.3g s, training waited %.3g s for it", step, took, blocked)
        except BaseException as error:  # no other thread would hear of it
            self._failure = f"{self.folder / step_folder(step)}: cannot be written: {type(error).__name__}: {error}"
            log.error("%s", self._failure)

    def _write_with_retries(self, files: Mapping[str, Any], step: int) -> int:
        """The bytes that this rank wrote; 0 where the checkpoint was given up."""
        target = self.folder / step_folder(step)
        attempts = 1 if self.settings.on_error == "stop" else self.settings.retries + 1
        for attempt in range(1, attempts + 1):
            size, problem, reached = self._attempt(files, target, step)
            if problem is None:
                return size
            if attempt < attempts:
                delay = min(self.first_wait * 2 ** (attempt - 1), _LONGEST_WAIT)
                if dist.get_rank() == 0:
                    log.warning("%s; attempt %d of %d, again in %.3g s", problem, attempt, attempts, delay)
                time.sleep(delay)
        if self.settings.on_error == "continue":
            self.skipped.append(step)
            what = "training goes on without this checkpoint"
        else:
            advice = "the checkpoints before it are untouched; make room or repair the disk, then start the run again"
            # The loops of the ranks are never more than a step apart.
            self._stop_at, self._failure = reached + 2, f"{problem}; {advice}"
            what = "training stops"
        if dist.get_rank() == 0:
            log.error("%s; %s (checkpoint.on_error: %s)", problem, what, self.settings.on_error)
        return 0

    def _attempt(self, files: Mapping[str, Any], target: Path, step: int) -> tuple[int, str | None, int]:
        """The bytes that this rank wrote; what went wrong on any rank (None: nothing) and the step that training has
        reached, both the same on all ranks."""
        rank = dist.get_rank()
        _, problem, reached = self._together(target, lambda: self._prepare(target, step) if rank == 0 else None)
        written: list[dict[str, FileEntry]] = []
        if problem is None:
            written, problem, reached = self._together(
                target, lambda: {name: write_tensors(state, target / name) for name, state in files.items()}
            )
        if problem is None:
            merged = {name: entry for part in written for name, entry in part.items()}
            _, problem, reached = self._together(
                target, lambda: self._commit(target, step, merged) if rank == 0 else None
            )
        if problem is not None:
            if rank == 0:
                shutil.rmtree(target, ignore_errors=True)  # the room it took is needed
            return 0, problem, reached
        if rank == 0:
            self._after_commit(target)
        return sum(entry.size for entry in written[rank].values()), None, reached

    def _together(self, target: Path, action: Callable[[], Any]) -> tuple[list, str | None, int]:
        """Runs `action` on every rank; (results by rank, the first rank's problem, furthest step reached)."""
        result, problem = None, None
        try:
            result = action()
        except OSError as error:
            problem = disk_error(error, target)
        except CheckpointError as error:
            problem = f"{error} ({free_space(target)})"
        mine = (result, problem, self._reached)
        answers = [mine]
        if self._group is not None:
            answers = [None] * dist.get_world_size()
            dist.all_gather_object(answers, mine, group=self._group)
        problems = [f"{p} (rank {i})" for i, (_, p, _) in enumerate(answers) if p]
        return [r for r, _, _ in answers], problems[0] if problems else None, max(s for _, _, s in answers)

    def _prepare(self, target: Path, step: int) -> None:
        if self._new_course and self.folder.is_dir():
            set_aside(self.folder, step)
        self._new_course = False
        if target.exists():
            shutil.rmtree(target)  # an incomplete one of a killed run
        target.mkdir(parents=True)

    def _commit(self, target: Path, step: int, files: Mapping[str, FileEntry]) -> None:
        """All ranks' files are on the disk: the manifest may say so."""
        sync_folder(target)
        for name, entry in files.items():
            check_size(target / name, entry)  # also finds an output folder that the ranks do not share
        manifest = Manifest(
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
        write_atomically(target / MANIFEST, manifest.to_json())
        sync_folder(self.folder)

    def _after_commit(self, target: Path) -> None:
        busy = ()
        if self._uploader is not None:
            self._uploader.submit(target)
            busy = self._uploader.busy
        prune(self.folder, self.settings.keep, self.settings.keep_every, busy)

    # -- resuming ------------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest checkpoint whose files all match its manifest, fetched from checkpoint.upload where there is none
        here; what is wrong with newer ones is logged. Rank 0 looks, all ranks get its answer.

        Raises:
            CheckpointError: there is none here, and the URL cannot be read.
        """
        self.wait()
        answer: list = [None, None]
        if dist.get_rank() == 0:
            try:
                found = self._newest_here()
                if found is None and self.settings.upload:
                    found = download_newest(self.settings.upload, self.folder)
                answer[0] = None if found is None else str(found)
            except CheckpointError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0)
        if answer[1]:
            raise CheckpointError(answer[1])
        self._verified = Path(answer[0]) if answer[0] else None
        return self._verified

    def _newest_here(self) -> Path | None:
        complete = complete_folders(self.folder)
        for folder in step_folders(self.folder):
            if folder not in complete:
                log.warning("%s: incomplete (no manifest): ignored", folder)
                continue
            try:
                verify(folder)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
                continue
            return folder
        return None

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
        self._new_course = True
        return manifest.step

    def _checked(self, folder: Path) -> Manifest:
        """Its manifest; its files are checked by rank 0, unless `newest` has just done so."""
        problem: list = [None]
        if dist.get_rank() == 0 and folder != self._verified:
            try:
                verify(folder)
            except CheckpointError as error:
                problem[0] = str(error)
        dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise CheckpointError(problem[0])
        return read_manifest(folder)
