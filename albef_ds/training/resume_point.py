"""Where a run goes on, and the refusal to begin again from step 0 where it has been further."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from pathlib import Path

from albef_ds.config import CheckpointConfig, ConfigError, load_config
from albef_ds.training.agreement import from_rank_zero
from albef_ds.training.checkpoint_manifest import CheckpointError, verify
from albef_ds.training.json_lines import read_lines
from albef_ds.training.retention import ASIDE, complete_folders, step_folders, step_of
from albef_ds.training.stop import STOPPED
from albef_ds.training.upload import download_newest

log = logging.getLogger(__name__)

ADVICE = "--resume none starts over, --resume FOLDER goes on from another checkpoint"


def resume_point(out: Path, settings: CheckpointConfig, wanted: str | None) -> Path | None:
    """The checkpoint to go on from, its files checked; None: from step 0. Collective; nothing is changed.

    Args:
        out: the run's folder.
        wanted: auto (the newest usable one; from checkpoint.upload where there is none here), none, or its folder.

    Raises:
        CheckpointError: the one that is wanted cannot be used; or, for auto, none can, but there are some, or the run
            must have had some.
    """
    if wanted in (None, "none"):
        return None
    if wanted != "auto":
        return from_rank_zero(lambda: verify(wanted) and Path(wanted), CheckpointError)
    return from_rank_zero(lambda: newest_or_refusal(out, settings), CheckpointError)


def newest_or_refusal(out: Path, settings: CheckpointConfig) -> Path | None:
    """The newest usable checkpoint; None where there was none yet. Raises CheckpointError where there was."""
    folder = out / "checkpoints"
    try:
        found, faults = newest_usable(folder, settings.upload)
        if found is not None:
            return found
        if not faults:
            faults = _traces(out, settings)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}; nothing was changed") from error
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise CheckpointError(
            f"{folder}: no checkpoint here can be used, and a run does not start over unasked:\n{lines}\n"
            f"Nothing was changed. {ADVICE}"
        )
    return None


def newest_usable(folder: Path, upload: str | None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder`, or behind the URL `upload`, whose files all match its manifest, and what is
    wrong with those that come before it."""
    faults = _not_a_folder(folder)
    if not faults:
        faults = _links(folder)
        complete = complete_folders(folder)
        for checkpoint in step_folders(folder):
            if checkpoint not in complete:
                log.warning("%s: incomplete (no manifest): ignored", checkpoint)
                continue
            try:
                verify(checkpoint)
            except CheckpointError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                log.warning("%s; trying the one before", fault)
            return checkpoint, faults
    if upload is None:
        return None, faults
    try:
        found, remote = download_newest(upload, folder)
    except CheckpointError as error:
        if not faults:
            raise
        return None, [*faults, str(error)]
    return found, faults + remote


def _not_a_folder(folder: Path) -> list[str]:
    if folder.is_dir() or not os.path.lexists(folder):
        return []
    what = f"a link to {os.readlink(folder)}, which is not there" if folder.is_symlink() else "not a folder"
    return [f"{folder}: {what}"]


def _links(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    links = sorted(p for p in folder.iterdir() if step_of(p.name) is not None and stat.S_ISLNK(p.lstat().st_mode))
    return [f"{link}: a link; links are not followed: put the checkpoint itself there" for link in links]


def _traces(out: Path, settings: CheckpointConfig) -> list[str]:
    """What says that this run once had a checkpoint, of which nothing whole is left.

    A run killed before its first checkpoint was written is no such case: it may begin again. That checkpoint is on the
    disk before the second one is begun, unless checkpoint.on_error says to go on without.
    """
    folder, traces = out / "checkpoints", []
    with contextlib.suppress(ConfigError):
        settings = load_config(str(out / "config.yaml")).checkpoint  # of the run that was; today's may be another
    incomplete = step_folders(folder)
    if settings.on_error != "continue":
        lines = read_lines(out / "metrics.jsonl")
        last = max((line["step"] for line in lines if type(line.get("step")) is int), default=0)
        if last > 2 * settings.every:
            saves = f"there was to be a checkpoint every {settings.every}"
            traces.append(f"{out / 'metrics.jsonl'}: goes to step {last}, and {saves}")
        if (out / STOPPED).exists():
            traces.append(f"{out / STOPPED}: the run was asked to end, and saved")
        if steps := _steps_of(out / "summary.json"):
            traces.append(f"{out / 'summary.json'}: the run has ended, after step {steps}")
    if traces or len(incomplete) > 1:
        traces += [f"{checkpoint}: incomplete (no manifest)" for checkpoint in incomplete]
        traces += [f"{checkpoint}: set aside when the run started over" for checkpoint in folder.glob(f"{ASIDE}step_*")]
    return traces


def _steps_of(summary: Path) -> int:
    """Of a run's summary.json; 0 where there is none, or another command's."""
    try:
        steps = json.loads(summary.read_text(encoding="utf-8")).get("steps", 0)
    except (OSError, ValueError, AttributeError):
        return 0
    return steps if type(steps) is int else 0
