"""Which checkpoints a run keeps: the newest few, and every so many steps one for good."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from albef_ds.training.checkpoint_files import remove_folder
from albef_ds.training.checkpoint_manifest import MANIFEST

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{8,15})")
ASIDE = "set_aside_"  # before the names of what another course of the same run has left


def step_folder(step: int) -> str:
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a folder's name; None for other names."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def step_folders(folder: Path) -> list[Path]:
    """Folders named after a step, newest first, whole or not. Links are not followed."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if step_of(p.name) is not None and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: step_of(p.name), reverse=True)


def complete_folders(folder: Path) -> list[Path]:
    """Those with a manifest, newest first; whether their files match it, `verify` says."""
    return [p for p in step_folders(folder) if (p / MANIFEST).is_file()]


def superfluous(steps: Iterable[int], keep: int, keep_every: int | None = None) -> list[int]:
    """Of the steps with a complete checkpoint those that go: all but the newest `keep` and the multiples of
    `keep_every`. The newest always stays."""
    oldest_last = sorted(set(steps), reverse=True)
    return [s for s in oldest_last[max(1, keep) :] if not (keep_every and s % keep_every == 0)]


def prune(
    folder: Path, keep: int, keep_every: int | None = None, busy: Iterable[Path] = (), remove: bool = True
) -> list[Path]:
    """Removes what is superfluous, and incomplete ones older than the newest complete; returns what that was.

    Args:
        remove: False: only says what would go.
        busy: not to be touched now, e.g. while they are uploaded; a later call takes them.
    """
    complete = {step_of(p.name): p for p in complete_folders(folder)}
    if not complete:
        return []
    gone = [complete[step] for step in superfluous(complete, keep, keep_every)]
    newest = max(complete)
    gone += [p for p in step_folders(folder) if p not in complete.values() and step_of(p.name) < newest]
    gone = [path for path in gone if path not in set(busy)]
    for path in gone if remove else ():
        remove_folder(path, first=MANIFEST)
    return gone


def set_summary_aside(out: Path) -> None:
    """That a run has ended is true no more where it begins again."""
    if (out / "summary.json").exists():
        (out / "summary.json").replace(out / f"{ASIDE}summary.json")


def set_aside(folder: Path, step: int) -> list[Path]:
    """Renames what another course of the run has left than the one whose next checkpoint is of `step`, or later:
    complete checkpoints from there on, which a resume would otherwise prefer; links, which saving would meet; and,
    where none is complete, incomplete ones, which may be all that is left of a run. A single one of these is what a
    killed run leaves of its first, and is removed. Returns the new names."""
    moved, complete = [], complete_folders(folder)
    links = [path for path in folder.iterdir() if step_of(path.name) is not None and path.is_symlink()]
    incomplete = [] if complete else step_folders(folder)
    if len(incomplete) == 1:
        remove_folder(incomplete.pop(), first=MANIFEST)
    for path in [*(path for path in complete if step_of(path.name) >= step), *links, *incomplete]:
        target = folder / f"{ASIDE}{path.name}"
        remove_folder(target, first=MANIFEST)
        path.rename(target)
        moved.append(target)
        log.warning("%s: of an earlier course of this run: now %s; delete it when you need it no more", path, target)
    return moved
