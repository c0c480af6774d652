"""Loader processes end with the iterator that they work for, whatever they are at."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from albef_ds.data import worker_processes
from albef_ds.data.worker_processes import WorkerLostError, batches_of

ROOT = Path(__file__).parent.parent.parent


class Stuck(Dataset):
    """The first samples are there at once; each later one is waited for, as on a disk that is away."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= 4:
            time.sleep(600)
        return torch.tensor(index)


@pytest.fixture
def blocked():
    """As a training rank's workers inherit it: SIGTERM does not reach them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("ends", ["closed", "forgotten", "error"])
def test_workers_that_take_no_hint_are_gone_within_seconds(blocked, ends):
    batches = batches_of(DataLoader(Stuck(), batch_size=2, num_workers=2))
    assert next(batches).tolist() == [0, 1]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    began = time.monotonic()
    if ends == "error":
        workers[0].kill()
        with pytest.raises(WorkerLostError, match="(signal: Killed|exited unexpectedly). It prepared"):
            next(batches)
            next(batches)
    elif ends == "closed":
        batches.close()
    del batches
    assert time.monotonic() - began < 3 * worker_processes.ENDING_SECONDS
    assert not any(worker.is_alive() for worker in workers)


STUCK = """
import multiprocessing
from torch.utils.data import DataLoader
from albef_ds.data.worker_processes import batches_of
from tests.data.test_worker_processes import Stuck
batches = batches_of(DataLoader(Stuck(), batch_size=2, num_workers=2))
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
input()
"""


def test_workers_end_with_a_parent_that_is_killed():
    """Torch's look for their parent when they are next out of work."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-c", STUCK], cwd=ROOT, **pipes)
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(map(is_there, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [worker for worker in workers if is_there(worker)]
    for worker in left:
        worker.kill()
    assert not left


def is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_without_workers_it_is_the_loader(blocked):
    loader = DataLoader(torch.arange(6), batch_size=2, num_workers=0)
    assert [batch.tolist() for batch in batches_of(loader)] == [[0, 1], [2, 3], [4, 5]]
    assert multiprocessing.active_children() == []


def test_another_error_of_the_same_type_stays_what_it_is():
    with pytest.raises(RuntimeError, match="no worker") as error, worker_processes.lost_workers_named():
        raise RuntimeError("no worker")
    assert type(error.value) is RuntimeError
