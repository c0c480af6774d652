"""Starts training ranks with faults in them, and leaves them to themselves: unlike a launcher, it ends none.

Whatever happens to a run, none of its processes may stay, its loader workers among them: looked for after every one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from albef_ds.training.rendezvous import free_port

ROOT = Path(__file__).parent.parent.parent
WORKERS = 2  # as many loader processes a rank
MARK = "ALBEF_DS_TEST_RUN"  # in the environment of all that a run starts


@dataclass(frozen=True)
class Ended:
    """codes: exit statuses by rank; None: still there when the time was up. outputs: what each rank said."""

    codes: list[int | None]
    outputs: list[str]

    def __str__(self) -> str:
        return f"{self.codes}\n" + "\n---\n".join(self.outputs)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def run_faulty(
    faults: list[dict],
    arguments: list[str],
    folder: Path,
    ranks: int = 2,
    wait_for: tuple[int, ...] = (),
    seconds=280,
    workers: int = WORKERS,
    loader: str = "torch",
) -> Ended:
    """Waits for the ranks `wait_for` (none given: all) and then kills what is left. Nothing of theirs outlives them.

    workers: torch's loader has so many processes a rank, DALI's so many threads.
    """
    settings = [f"data.workers={workers}", f"data.loader={loader}"]
    with started(faults, [*arguments, *settings], folder, ranks) as run:
        waited = [run.processes[rank] for rank in wait_for or range(ranks)]
        until(lambda: all(p.poll() is not None for p in waited), seconds)
        codes = [p.poll() for p in run.processes]
    return Ended(codes, run.outputs)


@dataclass(frozen=True)
class Run:
    """Ranks that are under way. `mark`: what tells their processes, and all that these have started."""

    processes: list[subprocess.Popen]
    logs: list[Path]
    mark: str

    @property
    def outputs(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]

    def says(self, text: str, rank: int = 0, seconds: float = 120) -> None:
        """Waits until a rank has said this."""
        assert until(lambda: text in self.outputs[rank] or self.processes[rank].poll() is not None, seconds)
        assert text in self.outputs[rank], "\n---\n".join(self.outputs)

    def wait(self, seconds: float) -> list[int | None]:
        """Exit statuses; None: still there then."""
        until(lambda: all(p.poll() is not None for p in self.processes), seconds)
        return [p.poll() for p in self.processes]


@contextmanager
def started(faults: list[dict], arguments: list[str], folder: Path, ranks: int = 2, tag: str = "output"):
    """Ranks, killed at the end where they are still there; what they have started must then be gone within seconds."""
    port, mark = free_port(), uuid.uuid4().hex
    command = [sys.executable, "-m", "tests.reliability.faulty", json.dumps(faults), *arguments]
    logs = [folder / f"{tag}_{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as file:
            environ = {**environment(rank, ranks, port), MARK: mark}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT))
    try:
        yield Run(processes, logs, mark)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    assert_none_left(mark)


def assert_none_left(mark: str, seconds: float = 5) -> None:
    """No process with this mark is there, or will be in so many seconds; what is left is killed all the same."""
    gone = until(lambda: not marked(mark), seconds)
    left = marked(mark)
    for process in left:
        process.kill()
    assert gone, [str(process) for process in left]


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:  # ended just now, or another user's
            continue
    return found


def until(condition, seconds: float) -> bool:
    """Whether it came true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
