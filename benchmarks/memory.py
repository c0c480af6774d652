"""Peak memory of one contender's step, in a process of its own.

    python -m benchmarks.memory --contender "ours fp32" [--preset base] [--batch 4] [--captions mean14] [--device cpu]

On a GPU the allocator's peak. On a CPU the process's peak resident size, less what it held after its imports: model
state, activations and workspace together, as the process would need them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import PRESETS, contenders, measure, workload


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure_here(name: str, preset: str, batch: int, captions: str, device: torch.device, dropout: float) -> dict:
    """Two steps (the second has the optimiser's moments from the start)."""
    config = workload.preset(preset, dropout)
    data = workload.captions_batch(config, captions, batch)
    imported = resident_bytes()
    contender = contenders.build(name, config, device, data)
    for _ in range(2):
        contender()
    state = contender.state_bytes()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imported
    return {"peak bytes": peak, "state bytes": state, "above state bytes": peak - state}


def measure_apart(name: str, preset: str, batch: int, captions: str, device: torch.device, dropout: float) -> dict:
    """The same in a fresh process; {"error"} where that failed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        "--contender",
        name,
        "--preset",
        preset,
        "--batch",
        str(batch),
    ]
    command += ["--captions", captions, "--device", str(device), "--dropout", str(dropout)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": done.stderr.strip()[-300:] or f"exit code {done.returncode}"}
    return json.loads(lines[-1])


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contender", required=True, choices=contenders.NAMES)
    parser.add_argument("--preset", default="base", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--captions", default="mean14", choices=workload.CAPTIONS)
    parser.add_argument("--device", type=measure.device)
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args(argv)
    device = measure.pick_device(args.device)
    print(json.dumps(measure_here(args.contender, args.preset, args.batch, args.captions, device, args.dropout)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
