"""Microbenchmarks of the kernels: time, memory, and the share of what the chip could do.

    python -m benchmarks.kernels [--json] [--device cuda] [--out DIR] [--batches 64 512] [--lengths 65536] [--seconds 1]
                                 [--minutes 5]

Contenders of one shape are timed in turns, the shapes of training first. Operations and bytes are counted from the
shape: with N = B + M columns, one matrix product of a direction is 2 B N D operations; the loss needs two (model,
teacher) for its value and three more for its gradient, and each pass reads both banks once. The limit is the larger of
operations / measured matrix rate and bytes / measured copy bandwidth; "of limit" is the limit over the measured time.

On a GPU "ms" is the kernels' own time: the GPU waits until the host has queued all launches. "host ms" is what the host
takes for that. Where the GPU began before ("host-bound"), "ms" holds some of it. On a CPU the PyTorch forms alone are
timed.

Each row is in DIR/kernels.jsonl as soon as it is measured; the pages are written at the end, after SIGTERM too. What
`--minutes` left no time for is "not measured".
"""

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import kernel_rivals, measure
from benchmarks.kernel_pages import markdown, publish, result_of
from benchmarks.measure import Rows

BATCHES = (16, 64, 128, 256, 512, 1024)
LENGTHS = (4096, 16384, 65536, 262144)
KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU_NOTE = "This is a CPU: the PyTorch forms alone are timed. The Triton kernels are not measured here."


@dataclass(frozen=True)
class Job:
    """What is timed in one go: the losses at B and M, forward or both ways; without M (`length`) the samplers at B."""

    batch: int
    length: int | None = None
    with_grad: bool = False

    @property
    def head(self) -> dict:
        """The columns that say what a row is of."""
        if self.length is None:
            return {"kind": "sampler", "job": f"negatives B={self.batch}", "B": self.batch}
        way = "forward + backward" if self.with_grad else "forward"
        job = f"loss B={self.batch} M={self.length} {way}"
        return {"kind": "loss", "job": job, "B": self.batch, "M": self.length, "pass": way}


def jobs(batches, lengths) -> list[Job]:
    """All that is to be timed: what is nearest to training (B = 64, M = 65,536, both ways) first."""

    def distance(job: Job) -> float:
        length = 65536 if job.length is None else max(1, job.length)
        return abs(math.log2(job.batch / 64)) + abs(math.log2(length / 65536))

    found = [Job(b, m, with_grad) for with_grad in (True, False) for m in lengths for b in batches]
    return sorted(found + [Job(b) for b in batches], key=distance)


def cost(batch: int, length: int, dim: int, with_grad: bool, element: int) -> tuple[float, float]:
    """(operations, bytes) that the loss cannot do without, both directions; banks of `element` bytes a number."""
    columns = batch + length
    products = 5 if with_grad else 2
    passes = 2 if with_grad else 1
    return 2.0 * products * 2 * batch * columns * dim, 2.0 * passes * columns * dim * element


def failure(contender: str, error: Exception) -> dict:
    """The row of a contender that failed."""
    return {"contender": contender, "error": measure.failure(error)}


def compare(contenders: dict[str, Callable], device: torch.device, seconds: float, baseline: str) -> list[dict]:
    """One row per contender, timed in turns for about `seconds`; one that fails (memory, say) has a row that says so.

    Args:
        contenders: {name: function that builds the call to time}.
        baseline: the contender that the others' times are compared with, in "ratio".
    """
    calls, found, failed = {}, {}, []
    for name, build in contenders.items():
        try:
            call = build()
            call()  # compiles what is compiled at the first call
            peak = measure.peak_memory(call, device)
            host = measure.host_milliseconds(call, device)
            calls[name], found[name] = call, {"contender": name, "host ms": host, "peak bytes": peak}
        except Exception as error:  # a rival's failure is a result, not the end of the benchmark
            failed.append(failure(name, error))
    if not calls:
        return failed
    # Twice what the slowest host needs; one that waits for the GPU itself would need any time.
    slowest = max(row["host ms"] for row in found.values())
    clock = measure.Clock(device, head_start=min(20.0, max(2.0, 2 * slowest)))
    samples = measure.interleaved(calls, device, seconds, clock=clock)
    for name, times in samples.items():
        row = found[name] | timing(times)
        if device.type == "cuda":
            row["host-bound"] = clock.overtaken[calls[name]] > len(times) / 10
        if baseline in samples:
            row["ratio"] = measure.ratio(samples[baseline], times)
        row["peak MB"] = row["peak bytes"] and row["peak bytes"] / 2**20
        found[name] = row
    return [*failed, *found.values()]


def time_losses(job: Job, dim: int, device: torch.device, seconds: float, limits: dict) -> list[dict]:
    """The rows of one shape and pass; ours also say how near the chip's limit they come."""
    problem = kernel_rivals.Problem(job.batch, job.length, dim, device)
    rivals = kernel_rivals.losses(device)
    contenders = {name: partial(build, problem, job.with_grad) for name, build in rivals.items()}
    rows = compare(contenders, device, seconds * len(contenders), "eager fp32")
    for row in rows:
        if "ratio" in row:
            row["times eager"] = row["ratio"]["median"]
        if "ms" in row and row["contender"].startswith("ours"):
            kind = "bf16" if "bf16" in row["contender"] else "fp32"
            flops, traffic = cost(job.batch, job.length, dim, job.with_grad, 2 if kind == "bf16" else 4)
            limit = max(flops / limits[f"{kind} FLOP/s"], traffic / limits["copy bytes/s"]) * 1e3
            row |= {"FLOPs": flops, "bytes": traffic, "limit ms": limit, "of limit": limit / row["ms"]}
    return rows


def time_samplers(job: Job, device: torch.device, seconds: float) -> list[dict]:
    """The rows of one batch, one direction."""
    calls = kernel_rivals.samplers(torch.randn(job.batch, job.batch, device=device) * 5)
    loop = "loop of multinomial().item()"
    rows = compare({name: lambda call=call: call for name, call in calls.items()}, device, seconds, loop)
    return [row | ({"times loop": row["ratio"]["median"]} if "ratio" in row else {}) for row in rows]


def timing(samples) -> dict:
    """The columns of a row that hold times."""
    found = measure.summary(samples)
    return {"ms": found["median"], "20 %": found["q20"], "80 %": found["q80"], "samples": found["count"]}


def run(
    device: torch.device,
    batches,
    lengths,
    dim: int = 256,
    seconds: float = 1.0,
    minutes: float | None = None,
    rows: Rows | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Times everything, most valuable first, each row into `rows`; returns `result_of` them.

    Args:
        batches, lengths: B and M.
        seconds: of timing, per contender and shape.
        minutes: after which no further shape begins; None: no limit.
    """
    rows = rows or Rows(None)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    limits = {"copy bytes/s": measure.copy_bandwidth(device)}
    limits |= {f"{k} FLOP/s": measure.matmul_rate(device, d) for k, d in KINDS.items()}
    machine = {"environment": measure.environment(device), "limits": limits, "dim": dim}
    machine["note"] = CPU_NOTE if device.type == "cpu" else ""
    planned = jobs(batches, lengths)
    rows.add({"kind": "machine", **machine, "planned": [job.head["job"] for job in planned]})
    for job in planned:
        if time.monotonic() >= deadline:
            say(f"{minutes:g} minutes are over")
            break
        try:
            if job.length is None:
                timed = time_samplers(job, device, seconds)
            else:
                timed = time_losses(job, dim, device, seconds, limits)
        except RuntimeError as error:  # a problem that is too large for this chip's memory, say
            timed = [failure("all", error)]
        for row in timed:
            rows.add(job.head | row)
            say(f"{job.head['job']}: {row['contender']} " + (f"{row['ms']:.4g} ms" if "ms" in row else row["error"]))
    return result_of(rows.rows)


@contextlib.contextmanager
def sigterm_ends():
    """SIGTERM ends this process as `sys.exit` does, so that what is measured is still written."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--device", type=measure.device, help="cuda, cuda:1 or cpu; default: the GPU if there is one")
    parser.add_argument(
        "--out", type=measure.folder, help="also write kernels.jsonl, .json, .md and .png into this folder"
    )
    parser.add_argument("--batches", type=int, nargs="+", help=f"default {BATCHES}; on a CPU 16 64")
    parser.add_argument("--lengths", type=int, nargs="+", help=f"default {LENGTHS}; on a CPU 4096")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per contender and shape")
    parser.add_argument("--minutes", type=float, help="begin no further shape after so long; default: no limit")
    args = parser.parse_args(argv)
    device = measure.pick_device(args.device)
    if device.type == "cpu":
        print(CPU_NOTE, file=sys.stderr)
    batches = args.batches or (BATCHES if device.type == "cuda" else (16, 64))
    lengths = args.lengths or (LENGTHS if device.type == "cuda" else (4096,))
    rows = Rows(args.out and args.out / "kernels.jsonl")
    say = partial(print, file=sys.stderr, flush=True)
    with sigterm_ends():
        try:
            result = run(device, batches, lengths, args.dim, args.seconds, args.minutes, rows, say)
        finally:
            if args.out and rows.rows:
                publish(result_of(rows.rows), args.out)
    print(json.dumps(result, indent=1) if args.json else markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
