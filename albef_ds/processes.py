"""Processes that end with those they belong to: a worker with its parent, a rank with the launcher that started it.

A process that is killed can clean up nothing, so nobody here waits for it to. The kernel ends a worker with its parent
(`die_with_parent`); a rank looks, once a second, whether the launchers it comes from are all still there (`Launchers`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
    "albef_ds",
)
_SCRIPTS = ("deepspeed", "ds", "torchrun")
_OURS = ("demo", "downstream")  # the commands of albef_ds that start a launcher
_SET_BY_LAUNCH = ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")  # by deepspeed.launcher.launch 0.19.8, for its ranks alone


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process, by SIGKILL, when process `parent`, which must have started it from its main
    thread, has ended. Linux alone knows this; elsewhere nothing is done."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(0)


def say(text: str) -> None:
    """One line on stderr from any thread, even where nobody reads it any more and while Python ends."""
    with contextlib.suppress(OSError):
        os.write(2, f"albef_ds: {text}\n".encode())


class Launchers:
    """The launchers among this process's ancestors, DeepSpeed's, torchrun and our own commands that start one.

    Args:
        environ: what says whether DeepSpeed started this process, even where its launcher is gone already.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ):
        self._links = _up_to_last_launcher()
        started_by_one = all(name in environ for name in _SET_BY_LAUNCH)
        self._gone_already = not self._links and started_by_one and _is_orphan()

    def gone(self) -> str | None:
        """Which of them is there no more, in words; None while all are, and where there never were any."""
        if self._gone_already:
            return "the launcher that started it"
        for child, parent in self._links:
            try:
                if _parent_of(child) != parent:
                    return f"its launcher (process {parent})"
            except psutil.NoSuchProcess:
                return f"its launcher (process {child})"
            except psutil.Error:  # not ours to look at any more: no reason to end
                continue
        return None


def _up_to_last_launcher() -> list[tuple[int, int]]:
    """(process, its parent) from this process up to the highest launcher among its ancestors; [] without one."""
    links, last, child = [], 0, os.getpid()
    try:
        for ancestor in psutil.Process().parents():
            links.append((child, ancestor.pid))
            if _is_launcher(ancestor.cmdline()):
                last = len(links)
            child = ancestor.pid
    except psutil.Error:  # another user's, or it has just ended
        pass
    return links[:last]


def _is_orphan() -> bool:
    """Whether this process was handed on to the system's first process, or to the session's, as those are whose parent
    has ended. A parent that runs Python may be a launcher that does not look like one (in a debugger, renamed)."""
    try:
        parent = psutil.Process().parent()
        name = "" if parent is None else parent.name()  # None: not to be seen from this container
        return parent is not None and (parent.pid == 1 or name == "systemd") and not name.startswith("python")
    except psutil.Error:
        return False


def _parent_of(process: int) -> int:
    return os.getppid() if process == os.getpid() else psutil.Process(process).ppid()


def _is_launcher(command: Sequence[str]) -> bool:
    """Whether this is the command line of a launcher: `python … -m MODULE …` or `python …/SCRIPT …`."""
    if not command or not Path(command[0]).name.startswith("python"):
        return bool(command) and Path(command[0]).name in _SCRIPTS
    words = iter(command[1:])
    for word in words:
        if word in ("-W", "-X"):  # Python's options that take the next word
            next(words, None)
        elif word == "-m":
            module = next(words, "")
            return module in _MODULES and (module != "albef_ds" or next(words, "") in _OURS)
        elif not word.startswith("-"):
            return Path(word).name in _SCRIPTS
    return False
