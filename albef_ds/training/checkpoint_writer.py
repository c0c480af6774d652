"""Writes checkpoints while training goes on: a thread of every rank writes its files, and rank 0's, once all have said
that theirs are on the disk, the manifest. Disks that fail, for a while or for good, are met here.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from albef_ds.config import CheckpointConfig
from albef_ds.data.files import write_atomically
from albef_ds.training import ending
from albef_ds.training.checkpoint_files import disk_error, free_space, sync_folder, write_tensors
from albef_ds.training.checkpoint_manifest import MANIFEST, CheckpointError, FileEntry, Manifest, check_size
from albef_ds.training.retention import prune, set_aside, step_folder
from albef_ds.training.upload import Uploader

log = logging.getLogger(__name__)

CHECKPOINT_THREAD = "checkpoint"  # the name of the thread that writes
_PATIENCE = timedelta(hours=6)  # for the slowest rank's disk
_GRACE = 10.0  # seconds between the first rank's hearing of a failure and the last's, at most
_LONGEST_WAIT = 60.0  # seconds between two attempts


@dataclass(frozen=True)
class SaveTiming:
    """What one checkpoint cost: `blocked_s` of training's time, `write_s` in the background, this rank's `bytes`."""

    step: int
    blocked_s: float
    write_s: float
    bytes: int


def finish_writing() -> bool:
    """After an error a checkpoint may still be written: waits for it, for as long as this process has to end, and
    returns whether that is over."""
    threads = [thread for thread in threading.enumerate() if thread.name == CHECKPOINT_THREAD]
    for thread in threads:
        thread.join(ending.SECONDS)
    return not any(thread.is_alive() for thread in threads)


class CheckpointWriter:
    """Writes one checkpoint at a time. All ranks call every method alike, and all end an attempt alike.

    Args:
        folder: holds a folder a checkpoint.
        manifest: of (step, the files of all ranks).
        uploader: where copies go, on rank 0.
        first_wait: seconds before the first further attempt after a failure; doubled every time.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        manifest: Callable[[int, Mapping[str, FileEntry]], Manifest],
        uploader: Uploader | None,
        first_wait: float,
    ):
        self.folder, self.settings = folder, settings
        self.timings: list[SaveTiming] = []
        self.skipped: list[int] = []  # steps whose checkpoint could not be written, the run going on
        self.new_course = True  # later checkpoints that are there already are not of the course that this run takes
        self._manifest = manifest
        self._uploader = uploader
        self._first_wait = first_wait
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def begin(self, files: Mapping[str, Any], step: int, waiting_since: float) -> None:
        """Starts to write this rank's `files`, by name, as the checkpoint of `step`; nothing may change them until
        `wait` returns. waiting_since: when training began to wait for this one, by time.perf_counter."""
        if self._group is None and dist.get_world_size() > 1:
            # Of its own: the threads of the ranks talk while training's collectives are under way.
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        arguments = (files, step, time.perf_counter() - waiting_since)
        # No daemon: a run that ends in an error still has a minute for the checkpoint that it has begun.
        self._thread = threading.Thread(target=self._write, args=arguments, name=CHECKPOINT_THREAD)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is on the disk; raises CheckpointError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def give_up(self) -> None:
        """Some rank has failed. Raises CheckpointError on this one too, which may be about to hear of it."""
        if self._thread is not None:
            self._thread.join(_GRACE)
        raise CheckpointError(self._failure or "another rank could not write its part of a checkpoint; see its log")

    def _raise(self) -> None:
        if self._failure:
            raise CheckpointError(self._failure)

    # -- in the thread -------------------------------------------------------------------------------------------------

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
            size, problem = self._attempt(files, target, step)
            if problem is None:
                return size
            if attempt < attempts:
                delay = min(self._first_wait * 2 ** (attempt - 1), _LONGEST_WAIT)
                if dist.get_rank() == 0:
                    log.warning("%s; attempt %d of %d, again in %.3g s", problem, attempt, attempts, delay)
                time.sleep(delay)
        if self.settings.on_error == "continue":
            self.skipped.append(step)
            what = "training goes on without this checkpoint"
        else:
            advice = "the checkpoints before it are untouched; make room or repair the disk, then start the run again"
            self._failure = f"{problem}; {advice}"
            what = "training stops"
        if dist.get_rank() == 0:
            log.error("%s; %s (checkpoint.on_error: %s)", problem, what, self.settings.on_error)
        return 0

    def _attempt(self, files: Mapping[str, Any], target: Path, step: int) -> tuple[int, str | None]:
        """The bytes that this rank wrote, and what went wrong on any rank (None: nothing), the same on all."""
        rank = dist.get_rank()
        _, problem = self._together(target, lambda: self._prepare(target, step) if rank == 0 else None)
        written: list[dict[str, FileEntry]] = []
        if problem is None:
            written, problem = self._together(
                target, lambda: {name: write_tensors(state, target / name) for name, state in files.items()}
            )
        if problem is None:
            merged = {name: entry for part in written for name, entry in part.items()}
            _, problem = self._together(target, lambda: self._commit(target, step, merged) if rank == 0 else None)
        if problem is not None:
            if rank == 0:
                shutil.rmtree(target, ignore_errors=True)  # the room it took is needed
            return 0, problem
        if rank == 0:
            self._after_commit(target)
        return sum(entry.size for entry in written[rank].values()), None

    def _together(self, target: Path, action: Callable[[], Any]) -> tuple[list, str | None]:
        """Runs `action` on every rank; (results by rank, the first rank's problem)."""
        result, problem = None, None
        try:
            result = action()
        except OSError as error:
            problem = disk_error(error, target)
        except CheckpointError as error:
            problem = f"{error} ({free_space(target)})"
        mine = (result, problem)
        answers = [mine]
        if self._group is not None:
            answers = [None] * dist.get_world_size()
            dist.all_gather_object(answers, mine, group=self._group)
        problems = [f"{p} (rank {i})" for i, (_, p) in enumerate(answers) if p]
        return [r for r, _ in answers], problems[0] if problems else None

    def _prepare(self, target: Path, step: int) -> None:
        if self.new_course and self.folder.is_dir():
            set_aside(self.folder, step)
        self.new_course = False
        if target.exists():
            shutil.rmtree(target)  # an incomplete one of a killed run
        target.mkdir(parents=True)

    def _commit(self, target: Path, step: int, files: Mapping[str, FileEntry]) -> None:
        """All ranks' files are on the disk: the manifest may say so."""
        sync_folder(target)
        for name, entry in files.items():
            check_size(target / name, entry)  # also finds an output folder that the ranks do not share
        write_atomically(target / MANIFEST, self._manifest(step, files).to_json())
        sync_folder(self.folder)

    def _after_commit(self, target: Path) -> None:
        busy = ()
        if self._uploader is not None:
            self._uploader.submit(target)
            busy = self._uploader.busy
        prune(self.folder, self.settings.keep, self.settings.keep_every, busy)
