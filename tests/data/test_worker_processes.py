"""Loader processes end with the iterator that they work for, whatever they are at."""

from __future__ import annotations

import multiprocessing
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from albef_ds.data import worker_processes
from albef_ds.data.worker_processes import WorkerLostError, batches_of


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


def test_without_workers_it_is_the_loader(blocked):
    loader = DataLoader(torch.arange(6), batch_size=2, num_workers=0)
    assert [batch.tolist() for batch in batches_of(loader)] == [[0, 1], [2, 3], [4, 5]]
    assert multiprocessing.active_children() == []


def test_another_error_of_the_same_type_stays_what_it_is():
    with pytest.raises(RuntimeError, match="no worker") as error, worker_processes.lost_workers_named():
        raise RuntimeError("no worker")
    assert type(error.value) is RuntimeError
