"""Builds DeepSpeed's shared-memory collectives for the CPU so that a run killed meanwhile blocks no later one.

PyTorch marks a build by a file `lock` in the extension's folder, at every start, and others wait until it is gone: for
ever, if its owner was killed. Here a file lock, which the system frees with its owner, stands around that. Whoever
holds it and finds the note of a build that never ended knows that `lock` is left over, and removes it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed.accelerator import get_accelerator

log = logging.getLogger(__name__)

FOREIGN_SECONDS = 600.0  # older than any build: a `lock` that another program must have left


def build_cpu_collectives() -> None:
    """Before the process group is made; nothing where there is a GPU."""
    if get_accelerator().device_name() != "cpu":
        return
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    from torch.utils import cpp_extension

    # Two versions of ninja rebuild each other's files at every start: always the one beside this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with building(Path(cpp_extension._get_build_directory(builder.name, False))):
        builder.load(verbose=False)  # DeepSpeed, which wants it next, finds it loaded


@contextmanager
def building(folder: Path, foreign_seconds: float = FOREIGN_SECONDS) -> Iterator[None]:
    """Alone among this project's processes on the machine, and without a `lock` that somebody dead has left."""
    theirs = folder / "lock"
    with open(folder / "albef_ds.building", "a+") as note:
        fcntl.flock(note, fcntl.LOCK_EX)
        note.seek(0)
        if note.read():
            log.warning("%s: left by a process that was killed: removed", theirs)
            theirs.unlink(missing_ok=True)
        while (age := _age(theirs)) is not None:  # another program builds, or was killed while it did
            if age > foreign_seconds:
                log.warning("%s: there for %.0f s, nobody builds for so long: removed", theirs, age)
                theirs.unlink(missing_ok=True)
            time.sleep(0.1)
        note.truncate(0)
        note.write(f"process {os.getpid()}")
        note.flush()
        yield
        note.truncate(0)


def _age(path: Path) -> float | None:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
