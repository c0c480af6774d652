"""An orderly end on SIGTERM or SIGUSR1: any rank may get the signal, all save after the next step and end.

Status EXIT_REQUEUE (75) means: start the same command again, it goes on from there. A batch script may end with

    [ $? -eq 75 ] && scontrol requeue $SLURM_JOB_ID

A second signal ends the process at once, with 128 + its number, and the last complete checkpoint counts. Outside the
training loop (while a run is built or evaluated) there is nothing to save: the first signal ends it, with EXIT_REQUEUE.

A launcher that is gone, killed as a rule, counts as a signal: nobody else would end its ranks. Where saving takes
longer than `faults.dead_seconds`, the rank ends without.

The deepspeed launcher (0.19.8): SIGTERM to `deepspeed.launcher.launch` goes to its ranks one after the other, each has
30 s to end, and the launcher's own status is 1 whatever theirs. SIGTERM to the `deepspeed` command itself, on one
machine, is not passed on: it ends, and so do its ranks, as said. On several its ranks are not its children: where it is
killed, they go on. A signal sent to a rank ends all, and the launcher's status is 75. Because a
launcher may hide the status, `stopped.json` in the run's folder says the same, until the run goes on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from albef_ds.data.files import write_atomically
from albef_ds.processes import Launchers, say

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = "stopped.json"
LAUNCHER = "launcher"  # in `received`
LOOK_SECONDS = 1.0  # between two looks for the launcher


class Stopped(Exception):  # noqa: N818 (no error: a run that was asked to end)
    """The run was asked to end, and has saved. `step`: optimiser steps done."""

    def __init__(self, step: int):
        super().__init__(f"asked to end; saved after step {step}, the same command goes on from there")
        self.step = step


class StopSignals:
    """While entered, this process answers to SIGTERM, SIGUSR1 and the end of its launcher as described above; entered
    in another than the main thread, where Python allows no handlers, it does not.

    Threads answer: Python runs handlers in the main thread, which may be waiting for a lost rank for ever.
    """

    def __init__(self):
        self.received: str | None = None  # the signal's name, or LAUNCHER
        self._patience: float | None = None  # seconds for saving; None: there is nothing to save
        self._previous: dict = {}

    def __enter__(self) -> StopSignals:
        self._answers = threading.current_thread() is threading.main_thread()
        if not self._answers:
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._answer, args=(reader,), name="stop signals", daemon=True).start()
        self._left = threading.Event()
        launchers = Launchers()  # here, not in the thread: they are looked up while they are most likely there
        threading.Thread(target=self._watch, args=(launchers,), name="launcher watch", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        if not self._answers:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)  # ends the thread
        self._left.set()

    @contextmanager
    def holding(self, patience: float) -> Iterator[None]:
        """Within, the first signal is only noted in `received`. patience: seconds that saving may take once the
        launcher is gone."""
        self._patience = patience
        try:
            yield
        finally:
            self._patience = None

    def _answer(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as arrived:
            while number := arrived.read(1):  # one byte a signal, its number
                if number[0] in SIGNALS:
                    self._take(signal.Signals(number[0]))

    def _take(self, number: signal.Signals) -> None:
        if self._patience is None:
            os._exit(EXIT_REQUEUE)
        if self.received not in (None, LAUNCHER):
            os._exit(128 + number)
        self.received = number.name
        say(f"{number.name}: saving after the next step, then ending")

    def _watch(self, launchers: Launchers) -> None:
        while (gone := launchers.gone()) is None:
            if self._left.wait(LOOK_SECONDS):
                return
        _mute_unheard()
        rank, patience = os.environ.get("RANK", "0"), self._patience
        if patience is None:
            say(f"rank {rank} ends: {gone} is gone")
            os._exit(EXIT_REQUEUE)
        if self.received is not None:  # it is about to end, at the pace that whoever asked for it allows
            return
        self.received = LAUNCHER
        say(f"rank {rank}: {gone} is gone: saving after the next step, then ending")
        if not self._left.wait(patience):
            say(f"rank {rank} ends: {gone} is gone, and {patience:g} s later (faults.dead_seconds) it had not ended")
            os._exit(EXIT_REQUEUE)


def _mute_unheard() -> None:
    """What the launcher's output went to (tee, a log's pipe) may be gone with it: a line printed there would be an
    error, in place of a checkpoint."""
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        if any(found & (select.POLLERR | select.POLLNVAL) for _, found in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started within never see the signals: the launcher sends SIGTERM to a rank's loader workers too, and
    without them the rank could not take the step that all have yet to agree on."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def note_stopped(output_dir: Path, step: int, received: str | None) -> None:
    """`received`: what asked this rank to end; None where another rank was asked."""
    stopped = {"step": step, "signal": received, "status": EXIT_REQUEUE}
    write_atomically(output_dir / STOPPED, json.dumps(stopped))


def forget_stopped(output_dir: Path) -> None:
    (output_dir / STOPPED).unlink(missing_ok=True)
