"""Rehearses the training steps of all tasks on a GPU that is not there.

    python -m tests.rehearsal.tasks [--json] [--planted] [NAME ...]

A process of its own: the machine changes PyTorch globally, and must be there before PyTorch is imported. Ends with 1
where a case fails, or a fault that was planted is not noticed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks import fake_gpu

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    name: str
    error: str  # "": the case came to its end
    where: str  # file:line of this project that the error came out of
    seconds: float
    flops: int | None  # of both steps

    def __str__(self) -> str:
        outcome = f"{self.where}: {self.error}" if self.error else "ok"
        return f"{self.name:36} {self.seconds:5.1f} s  {outcome}"


def run(name: str, rehearsal: Callable[[], int | None]) -> Row:
    start, error, where, flops = time.perf_counter(), "", "", None
    try:
        flops = rehearsal()
    except Exception as found:  # whatever it is, it is what the row says
        error = f"{type(found).__name__}: {' '.join(str(found).split())[:500]}"
        where = place(found)
    return Row(name, error, where, round(time.perf_counter() - start, 2), flops)


def place(error: Exception) -> str:
    """The innermost line of the project's own; "backward" where autograd ran what no line of it wrote."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if re.match(rf"{ROOT}/(albef_ds|kernels)/", frame.filename):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
    return "backward" if "run_backward" in "".join(traceback.format_tb(error.__traceback__)) else "?"


def rehearsals(names: Collection[str], planted: bool) -> Iterator[tuple[Row, bool]]:
    """Every row, and whether it is as it should be.

    Args:
        names: of cases and of planted faults; none: all cases, or, where `planted`, all faults.
    """
    from tests.rehearsal.cases import CASES, rehearse
    from tests.rehearsal.plants import PLANTS

    for case in CASES:
        if case.name in names or not (names or planted):
            row = run(case.name, partial(rehearse, case))
            yield row, not row.error
    for plant in PLANTS:
        if plant.name in names or (planted and not names):
            with plant.broken():
                row = run(plant.name, partial(rehearse, plant.case))
            yield row, plant.caught(row.error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these cases or faults")
    parser.add_argument("--planted", action="store_true", help="steps broken on purpose, which must fail")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    options = parser.parse_args()
    try:
        fake_gpu.install()
    except RuntimeError as error:
        sys.exit(str(error))
    logging.getLogger("torch._subclasses").setLevel(logging.CRITICAL)  # it prints what the rows say anyway
    as_they_should_be = True
    for row, right in rehearsals(options.names, options.planted):
        print(json.dumps(asdict(row)) if options.json else row, flush=True)
        as_they_should_be &= right
    return 0 if as_they_should_be else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at the interpreter's own end fake storages that are still referred to make a great noise
