"""Work ahead of whoever waits for it, and work shared among threads."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

ENDING_SECONDS = 10.0  # for a thread to finish the item it is at


def in_parts(pool: ThreadPoolExecutor, parts: int, function: Callable, items: Sequence) -> list:
    """[function(item)], shared among the threads in as few jobs as there are threads."""
    jobs = [pool.submit(lambda some: [function(item) for item in some], items[i::parts]) for i in range(parts)]
    results: list = [None] * len(items)
    for i, job in enumerate(jobs):
        results[i::parts] = job.result()
    return results


def ahead(make: Callable[[], Iterator], depth: int) -> Iterator:
    """What `make()` yields, made by a thread up to `depth` items ahead; its exceptions are raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def work():
        items = make()
        try:
            for item in items:
                if not _put(ready, (item, None), stop):
                    return
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            _put(ready, (None, error), stop)
        finally:
            items.close()

    thread = threading.Thread(target=work, name="albef_ds loader", daemon=True)

    def end():
        stop.set()
        thread.join(ENDING_SECONDS)  # one that reads from a disk that is gone would be waited for without end

    thread.start()
    atexit.register(end)  # a thread inside DALI must not outlive the interpreter
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        atexit.unregister(end)
        end()


def _put(ready: queue.Queue, item, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
