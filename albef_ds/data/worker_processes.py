"""The processes of torch's DataLoader, which end when they are needed no more and never outlive who started them.

Torch leaves two gaps. A worker that does not end is sent SIGTERM, which a training rank's workers keep blocked (the
launcher sends it to them too, see training/stop.py), and Python joins its children without limit when it ends: such a
process stays for ever. And where a rank is killed, its workers notice only when they are next out of work.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.data import DataLoader

from albef_ds.processes import die_with_parent

ENDING_SECONDS = 2.0  # for a worker to finish what it is at; then it is killed: it holds nothing that anybody needs


class WorkerLostError(RuntimeError):
    """A process that prepares batches was killed, or ended by itself."""


class Raised:
    """In a batch's place: an error that a worker met. Torch would raise it with the worker's traceback in its message,
    which nobody needs who gave a path that is wrong."""

    def __init__(self, error: Exception):
        self.error = error


def batches_of(loader: DataLoader) -> Iterator:
    """The batches of a loader; its processes end with this iterator, within seconds, whatever they are at.

    Raises what is `Raised`, and WorkerLostError.
    """
    # The kernel means the thread, not the process, that has started it; and a fork server would stand between.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and multiprocessing.get_start_method() in ("fork", "spawn"):
        loader.worker_init_fn = partial(_start, os.getpid())
    before = set(multiprocessing.active_children())
    try:
        batches = iter(loader)
    except BaseException:  # some may have started
        _kill(set(multiprocessing.active_children()) - before)
        raise
    workers = list(batches._workers) if loader.num_workers else []
    try:
        with lost_workers_named():
            for batch in batches:
                if isinstance(batch, Raised):
                    raise batch.error
                yield batch
    finally:
        if workers:
            _end(batches, workers)


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Torch looks for dead workers whenever a child of this process ends, so its error can come out of any line of the
    main thread: whatever runs while there are workers, runs in here. Raises WorkerLostError in its place."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerLostError(
            f"{str(error).splitlines()[0].rstrip('. ')}. It prepared batches; where memory was short, lower "
            "data.workers. Start the same command again: it goes on from the last checkpoint"
        ) from None


def _start(parent: int, worker: int) -> None:
    die_with_parent(parent)


def _end(batches: Iterator, workers: Collection) -> None:
    """Torch's own way, in a thread, because it waits for its own threads without limit; then SIGKILL, which nobody can
    block."""
    # As torch 2.11 does it where nothing refers to the iterator any more.
    ending = threading.Thread(target=batches._shutdown_workers, name="loader ends", daemon=True)
    ending.start()
    with contextlib.suppress(WorkerLostError), lost_workers_named():  # no news: it was killed before
        ending.join(ENDING_SECONDS)
    _kill(workers)


def _kill(workers: Collection) -> None:
    """Torch's error that a worker is lost may come between any two lines here: it is no news, and stops nothing."""
    for worker in workers:
        with contextlib.suppress(WorkerLostError), lost_workers_named():
            worker.kill()
    deadline = time.monotonic() + ENDING_SECONDS
    for worker in workers:
        while time.monotonic() < deadline:
            with contextlib.suppress(WorkerLostError), lost_workers_named():
                worker.join(0.1)
                if not worker.is_alive():
                    break
