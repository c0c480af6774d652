"""Whole optimiser steps under DeepSpeed ZeRO-2, as one rank of eight, on a GPU that is not there.

    python -m tests.rehearsal.deepspeed_steps [--rank 3] [--cases NAME ...] [--faults] [--json]

Real are the project's engine, tasks and optimisers, DeepSpeed's ZeRO-2 with its buckets, hooks and streams, and
flash-attn's Python. Made up are the GPU (benchmarks.fake_gpu), the other seven ranks (benchmarks.fake_ranks), the
streams (benchmarks.fake_streams), and what DeepSpeed's compiled CPU Adam would compute. A line a case: how it ended,
and with --json what this rank asked the others for. --faults adds the cases that must fail.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING

from benchmarks import fake_gpu

if TYPE_CHECKING:
    from tests.rehearsal.deepspeed_cases import Rehearsal


def main(argv=None) -> int:
    """The command line in this file's head."""
    os.environ["DS_ACCELERATOR"] = "cuda"  # read when DeepSpeed is imported
    os.environ.pop("TRITON_INTERPRET", None)  # of a test run on a machine that does not claim to have a GPU
    fake_gpu.install()  # before torch is imported
    from deepspeed.utils import logger as deepspeed_logger

    from benchmarks import fake_ranks
    from tests.rehearsal.deepspeed_cases import CASES, WORLD, Case, Rehearsal
    from tests.rehearsal.deepspeed_faults import FAULTS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=0, choices=range(WORLD))
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    gc.disable()  # a tenth of the time, and there is nothing to be freed before the end
    deepspeed_logger.setLevel("ERROR")
    fake_ranks.join(args.rank, WORLD)
    fake_ranks.take_gpu(args.rank)
    rehearsals = {name: Rehearsal(CASES[name]) for name in args.cases}
    if args.faults:
        rehearsals |= {name: fault(Case()) for name, fault in FAULTS.items()}
    for name, rehearsal in rehearsals.items():
        row = {"case": name, "rank": args.rank, "on": "fake cuda", **outcome(rehearsal)}
        print(json.dumps(row) if args.json else f"{name}: {row['error'] or 'ok'}", flush=True)
    return 0


def outcome(rehearsal: Rehearsal) -> dict:
    """What a rehearsal finds, and `error`, None where it came to its end."""
    try:
        return {"error": None, **rehearsal.run()}
    except Exception as error:  # whatever it is: the next case has an engine of its own
        traceback.print_exc(file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Autograd's threads of a GPU may let go of a tensor while Python ends, which aborts a process that is done.
    os._exit(status)
