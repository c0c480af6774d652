"""An orderly end on SIGTERM or SIGUSR1: any rank may get the signal, all save after the next step and end.

Status EXIT_REQUEUE (75) means: start the same command again, it goes on from there. A batch script may end with

    [ $? -eq 75 ] && scontrol requeue $SLURM_JOB_ID

A second signal ends the process at once, with 128 + its number, and the last complete checkpoint counts. Outside the
training loop (while a run is built or evaluated) there is nothing to save: the first signal ends it, with EXIT_REQUEUE.

The deepspeed launcher (0.19.8): SIGTERM to `deepspeed.launcher.launch` goes to its ranks one after the other, each has
30 s to end, and the launcher's own status is 1 whatever theirs. SIGTERM to the `deepspeed` command itself is not passed
on. A signal sent to a rank ends all, and the launcher's status is 75. Because a launcher may hide the status,
`stopped.json` in the run's folder says the same, until the run goes on.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from albef_ds.data.files import write_atomically

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = "stopped.json"


class Stopped(Exception):  # noqa: N818 (no error: a run that was asked to end)
    """The run was asked to end, and has saved. `step`: optimiser steps done."""

    def __init__(self, step: int):
        super().__init__(f"asked to end; saved after step {step}, the same command goes on from there")
        self.step = step


class StopSignals:
    """While entered, this process answers to SIGTERM and SIGUSR1 as described above. Main thread only.

    A thread answers: Python runs handlers in the main thread, which may be waiting for a lost rank for ever.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._holding = False
        self._previous: dict = {}

    def __enter__(self) -> StopSignals:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._answer, args=(reader,), name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)  # ends the thread

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Within, the first signal is only noted in `received`."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False

    def _answer(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as arrived:
            while number := arrived.read(1):  # one byte a signal, its number
                if number[0] in SIGNALS:
                    self._take(signal.Signals(number[0]))

    def _take(self, number: signal.Signals) -> None:
        if not self._holding:
            os._exit(EXIT_REQUEUE)
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        os.write(2, f"albef_ds: {number.name}: saving after the next step, then ending\n".encode())


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started within never see the signals: the launcher sends SIGTERM to a rank's loader workers too, and
    without them the rank could not take the step that all have yet to agree on."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def note_stopped(output_dir: Path, step: int, received: signal.Signals | None) -> None:
    """`received`: the signal of this rank; None where another rank got it."""
    name = None if received is None else received.name
    write_atomically(output_dir / STOPPED, json.dumps({"step": step, "signal": name, "status": EXIT_REQUEUE}))


def forget_stopped(output_dir: Path) -> None:
    (output_dir / STOPPED).unlink(missing_ok=True)
