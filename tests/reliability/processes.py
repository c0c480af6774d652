"""Starts training ranks with faults in them, and leaves them to themselves: unlike a launcher, it ends none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from albef_ds.training.rendezvous import free_port

ROOT = Path(__file__).parent.parent.parent


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
    faults: list[dict], arguments: list[str], folder: Path, ranks: int = 2, wait_for: tuple[int, ...] = (), seconds=280
) -> Ended:
    """Waits for the ranks `wait_for` (none given: all) and then kills what is left."""
    port = free_port()
    command = [sys.executable, "-m", "tests.reliability.faulty", json.dumps(faults), *arguments]
    logs = [folder / f"output_{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as file:
            environ = environment(rank, ranks, port)
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + seconds
    waited = [processes[rank] for rank in wait_for or range(ranks)]
    while any(p.poll() is None for p in waited) and time.monotonic() < deadline:
        time.sleep(0.05)
    codes = [p.poll() for p in processes]
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return Ended(codes, [log.read_text(errors="replace") for log in logs])
