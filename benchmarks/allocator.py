"""The demo's first steps on the CPU, with glibc's malloc and with tcmalloc, in turns.

    python -m benchmarks.allocator [--demo runs/demo] [--steps 100] [--rounds 2] [--out DIR]

Whole runs under the deepspeed launcher, A B B A; a run's rate is the median of its log's lines from the second on. A
finished demo gives the data. tcmalloc must be installed (Debian: libtcmalloc-minimal4).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from albef_ds import optional
from albef_ds.demo import launch
from benchmarks import measure

ALLOCATORS = ("glibc", "tcmalloc")


def samples_per_s(demo: Path, allocator: str, steps: int) -> float:
    """Of one run; the launcher's environment loads tcmalloc unless it is hidden from it."""
    hidden = mock.patch.object(optional, "tcmalloc", lambda: None)
    paths = [f"data.shards=[{demo / 'shards'}]", f"data.test={demo / 'data/test.json'}"]
    paths += [f"data.tokenizer={demo / 'data/vocab.txt'}", "evaluation.k_test=1", "schedule.warmup_steps=20"]
    with tempfile.TemporaryDirectory() as output, mock.patch.dict(os.environ, {"LD_PRELOAD": ""}):
        settings = [*paths, f"output_dir={output}", f"train.max_steps={steps}"]
        with hidden if allocator == "glibc" else mock.MagicMock():
            status = launch("demo", settings)
        if status:
            raise SystemExit(f"the run ended with status {status}")
        lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["samples_per_s"] for line in lines if line.get("samples_per_s")][1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=measure.folder, help="a folder for allocator-cpu.json")
    args = parser.parse_args()
    if optional.tcmalloc() is None:
        raise SystemExit("tcmalloc is not installed (Debian and Ubuntu: apt install libtcmalloc-minimal4)")
    found: dict[str, list[float]] = {name: [] for name in ALLOCATORS}
    for turn in range(args.rounds):
        for name in ALLOCATORS if turn % 2 == 0 else ALLOCATORS[::-1]:
            found[name].append(samples_per_s(args.demo, name, args.steps))
    pairs = [b / a for a, b in zip(*found.values(), strict=True)]
    result = {
        "environment": measure.environment(torch.device("cpu")),
        "library": optional.tcmalloc(),
        "steps": args.steps,
        "samples_per_s": found,
        "times as fast": {"median": statistics.median(pairs), "each": pairs},
    }
    measure.publish(result, args.out, "allocator-cpu.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
