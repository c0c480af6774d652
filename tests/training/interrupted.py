"""Runs albef_ds.train in this process and kills it, with SIGKILL, at a chosen moment. Started by test_resume.py.

    python -m tests.training.interrupted MOMENT RANK STEP -- ARGUMENTS OF albef_ds.train

MOMENT: never | step (while that step's losses are logged) | manifest (its files are written, the manifest is not).
"""

from __future__ import annotations

import os
import signal
import sys

from albef_ds import train
from albef_ds.training.checkpoint_writer import CheckpointWriter
from albef_ds.training.monitor import Monitor


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    moment, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if os.environ["RANK"] == rank:
        log, commit = Monitor.log, CheckpointWriter._commit
        if moment == "step":
            Monitor.log = lambda self, at, *args: die() if at == step else log(self, at, *args)
        elif moment == "manifest":
            CheckpointWriter._commit = lambda self, folder, at, files: (
                die() if at == step else commit(self, folder, at, files)
            )
    return train.main(sys.argv[sys.argv.index("--") + 1 :])


if __name__ == "__main__":
    sys.exit(main())
