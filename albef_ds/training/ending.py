"""The last resort: a process that has come to its end and does not go is ended.

Nothing that matters is left to do then: a run that went well has waited for its files, and one that failed may finish
the checkpoint that it has begun, for so long. What can hold a process up: a thread of a library, a collective without
its peers while groups are destroyed, a disk that is gone.
"""

from __future__ import annotations

import os
import threading
import time

SECONDS = 60.0  # as faults.dead_seconds is by default, within which the other ranks of a failed one end


def end_soon(code: int, seconds: float = SECONDS) -> None:
    """From now on this process has so many seconds to end by itself; then it ends with this status."""

    def end() -> None:
        time.sleep(seconds)
        rank = os.environ.get("RANK", "0")
        os.write(2, f"albef_ds: rank {rank}: still there {seconds:g} s after its end: ended, status {code}\n".encode())
        os._exit(code)

    threading.Thread(target=end, name="last resort", daemon=True).start()
