"""The last resort: a process that has come to its end and does not go is ended.

Nothing that matters is left to do then: a run that went well has waited for its files, and one that failed may finish
the checkpoint that it has begun, for so long. What can hold a process up: a thread of a library, a collective without
its peers while groups are destroyed, a disk that is gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from albef_ds.processes import say

SECONDS = 60.0  # as faults.dead_seconds is by default, within which the other ranks of a failed one end


@contextmanager
def last_resort(whole_process: bool) -> Iterator[Callable[[int], None]]:
    """Around all that a command does; what it yields is to be called with the exit status as soon as that is known.

    whole_process: this process has nothing else to do afterwards; False: nothing is ended, somebody else goes on in it.
    """
    try:
        yield end_soon if whole_process else lambda code: None
    except BaseException:
        if whole_process:
            end_soon(1)
        raise


def end_soon(code: int, seconds: float = SECONDS) -> None:
    """From now on this process has so many seconds to end by itself; then it ends with this status, or, where Python is
    being taken down already, by SIGALRM. For the main thread of a process that has nothing else to do."""

    def end() -> None:
        time.sleep(seconds)
        say(f"rank {os.environ.get('RANK', '0')}: still there {seconds:g} s after its end: ended, status {code}")
        os._exit(code)

    threading.Thread(target=end, name="last resort", daemon=True).start()
    # No thread of Python's runs any more once the interpreter is taken down, where a library may still wait.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
