"""Whole training steps of ours and of the reference, timed in turns on the same batch.

    python -m benchmarks.step [--json] [--device cpu|cuda] [--preset base|small|tiny] [--batch N]
                              [--captions histogram full] [--contenders NAME ...] [--minutes 3.5] [--profile]

A step is forward, backward, optimiser, teacher and queue, without loading data. Contenders run A B B A in one process;
ratios are medians of pairs with a 95 % bootstrap interval. Captions are drawn from the histogram, and all full. "mfu"
is the FLOPs that the contender executes (counted in one more of its steps, compiled regions run as they are written)
over the device's peak. What the time or the device does not allow is "not measured". `--out` also writes the result
into a folder, each row into step.jsonl as soon as it is there; `--profile` adds a trace and a table of the dearest
operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from albef_ds.data.files import write_atomically
from albef_ds.training.flops import FlopCount
from albef_ds.training.peak_flops import peak_flops_of, peak_flops_source
from benchmarks import PRESETS, batch_sizes, contenders, counts, measure, memory, workload

# What is compared in one process: on a CPU no more than fits into memory beside each other.
GROUPS = {
    "cpu": (("ours fp32", "ours bf16", "reference"), ("ours bf16", "modernised")),
    "cuda": (("ours bf16", "reference", "modernised"),),
}
BATCH = {"cpu": 4, "cuda": 64}
NOT_ON_A_CPU = ["a GPU", "the largest batch that fits", "torch.compile of the modernised rival"]
BEST_COLUMNS = ["contender", "largest batch", "quickest batch", "samples/s there", "ended by"]


def compare(names, config, device, batch, captions: str, deadline: float, args) -> Iterator[dict]:
    """A row a contender, as soon as it is there: step times, samples/s, phases, FLOPs, ratios to each rival in the
    group. A contender that fails has a row that says so. Building and compiling come off the time that is left until
    the deadline."""
    warmup = 3 if device.type == "cuda" else args.warmup
    data = workload.captions_batch(config, captions, batch)
    built = {}
    for name in names:
        try:
            plain = name in ("ours fp32", "ours bf16")
            shared = next((c for other, c in built.items() if plain and other in ("ours fp32", "ours bf16")), None)
            built[name] = contenders.build(name, config, device, data, shared)
            built[name]()
        except Exception as error:  # a rival's failure is a result, not the end of the benchmark
            built.pop(name, None)
            yield {"contender": name, "captions": captions, "error": measure.failure(error)}
    used: dict[str, list[float]] = {name: [] for name in built}
    calls = {name: with_cpu_time(contender, used[name]) for name, contender in built.items()}
    seconds = min(args.seconds, max(0.0, deadline - time.monotonic()))
    samples = measure.interleaved(calls, device, seconds, least=args.least, warmup=warmup) if built else {}
    for name, times in samples.items():
        row = {"contender": name, "captions": captions, "batch": batch, **measure.summary(times)}
        row["samples/s"] = 1e3 * batch / row["median"]
        if name.startswith("ours"):
            # Of the rival's time: below 1 is faster. Pairs are rounds, so a slow minute hits both of them.
            rivals = [rival for rival in samples if not rival.startswith("ours")]
            row["of"] = {rival: measure.ratio(times, samples[rival]) for rival in rivals}
            if device.type == "cpu":  # what a busy neighbour takes away is not in it
                row["cpu time of"] = {r: measure.ratio(used[name][warmup:], used[r][warmup:]) for r in rivals}
        row["cpu ms"] = statistics.median(used[name][warmup:])
        try:  # what fails here, for memory say, takes nothing from the times
            row["phases ms"] = built[name].phases(device, steps=1 if row["median"] > 2000 else 3)
            row |= rates(built[name], device, batch, row["samples/s"])
            if device.type == "cuda":
                row["launches"] = counts.kernel_launches(built[name])
        except Exception as error:
            row["not counted"] = measure.failure(error)
        yield row


def with_cpu_time(step: Callable[[], object], used: list[float]):
    """The step, noting the milliseconds of processor time of each call."""

    def call() -> None:
        start = time.process_time()
        step()
        used.append(1e3 * (time.process_time() - start))

    return call


def rates(contender: contenders.Contender, device: torch.device, batch: int, samples_per_s: float) -> dict:
    """FLOP/s and MFU, from the FLOPs of one more step on the same batch."""
    with torch.compiler.set_stance("force_eager"), FlopCount() as counted:
        contender()
    a_sample, peak = counted.total / batch, peak_flops_of(device)
    rate = a_sample * samples_per_s
    return {"FLOP a sample": a_sample, "FLOP/s": rate, "mfu": rate / peak if peak else None}


def profile(name: str, config, device, batch: int, captions: str, out: Path) -> str:
    """Writes a trace of two steps into `out`; returns the table of the dearest operations."""
    from torch.profiler import ProfilerActivity

    contender = contenders.build(name, config, device, workload.captions_batch(config, captions, batch))
    contender()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            contender()
    out.mkdir(parents=True, exist_ok=True)
    stem = name.replace(" ", "_")
    profiler.export_chrome_trace(str(out / f"{stem}.trace.json"))
    table = profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=30)
    (out / f"{stem}.operations.txt").write_text(table)
    return table


def report(args, say) -> dict:
    """All that the command line asks for and the time allows; with --out, written as far as it has come after each
    comparison."""
    device, config = measure.pick_device(args.device), workload.preset(args.preset, args.dropout)
    batch = args.batch or BATCH[device.type]
    groups = [tuple(args.contenders)] if args.contenders else GROUPS[device.type]
    names = list(dict.fromkeys(name for group in groups for name in group))
    kept = measure.Rows(args.out and args.out / "step.jsonl")
    result = {"environment": measure.environment(device), "preset": args.preset, "dropout": args.dropout, "steps": []}
    result["peak"] = {"FLOP/s": peak_flops_of(device), "source": peak_flops_source(device)}
    result["not measured"] = [] if device.type == "cuda" else list(NOT_ON_A_CPU)
    kept.add(result | {"what": "head"})
    if args.profile:
        say(profile(names[0], config, device, batch, args.captions[0], args.out or Path("runs/step_profile")))
    deadline = time.monotonic() + 60 * args.minutes
    todo = [] if args.only_sizes else [(group, captions) for group in groups for captions in args.captions]
    for done, (group, captions) in enumerate(todo):
        left = deadline - time.monotonic()
        if left <= 0:
            result["not measured"] += [f"{name}, captions {captions}: no time left" for name in group]
            continue
        for row in compare(
            group, config, device, batch, captions, deadline - left * (1 - 1 / (len(todo) - done)), args
        ):
            result["steps"].append(row)
            kept.add({"what": "step", **row})
            say(f"{captions}: {row['contender']}: " + (row.get("error") or f"{row['median']:.4g} ms a step"))
        batch_sizes.release(device)
        write(result, args.out)
    if args.memory:
        case = (args.preset, batch, args.captions[0], device, args.dropout)
        result["memory"] = {}
        for name in names:
            result["memory"][name] = memory.measure_apart(name, *case)
            kept.add({"what": "memory", "contender": name, **result["memory"][name]})
        write(result, args.out)
    if args.sizes or args.only_sizes:

        def keep(row: dict) -> None:
            kept.add({"what": "batch size", **row})
            say(
                f"batch {row['batch']}: {row['contender']}: "
                + (row.get("error") or f"{row['samples/s']:.4g} samples/s")
            )

        result["batch sizes"] = batch_sizes.sweep(names, config, device, args.captions[0], args.sizes_minutes, keep)
    return result


def write(result: dict, out: Path | None) -> None:
    """step.json and step.md as far as they have come."""
    if out is not None:
        write_atomically(out / "step.json", json.dumps(result, indent=1) + "\n")
        write_atomically(out / "step.md", render(result) + "\n")


def render(result: dict) -> str:
    """The result as Markdown."""
    rows = []
    for row in result["steps"]:
        compared = (row.get("of") or {}).items()
        shown = "; ".join(f"{r['median']:.3f} of {name} ({r['low']:.3f} to {r['high']:.3f})" for name, r in compared)
        of_cpu = [f"{r['median']:.3f} of {name}" for name, r in (row.get("cpu time of") or {}).items()]
        shown += f"; processor time {', '.join(of_cpu)}" if of_cpu else ""
        rows.append({**row, "ms": row.get("median"), "ratio": shown or row.get("error", ""), "pairs": row.get("count")})
    columns = ["contender", "captions", "batch", "ms", "q20", "q80", "samples/s", "mfu", "pairs", "ratio"]
    phases = [
        {"contender": r["contender"], "captions": r["captions"], **r["phases ms"]} for r in rows if "phases ms" in r
    ]
    parts = [measure.table(rows, columns), measure.table(phases, ["contender", "captions", *contenders.PHASES])]
    if result.get("batch sizes"):
        parts.append(measure.table(batch_sizes.best(result["batch sizes"]), BEST_COLUMNS))
    if "memory" in result:
        held = [{"contender": name, **found} for name, found in result["memory"].items()]
        parts.append(measure.table(held, ["contender", "peak bytes", "state bytes", "above state bytes"]))
        parts += [f"{row['contender']}: {row['error']}" for row in held if "error" in row]
    return "\n\n".join([*parts, "Not measured: " + "; ".join(result["not measured"])])


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--device", type=measure.device)
    parser.add_argument("--preset", default="base", choices=PRESETS)
    parser.add_argument("--batch", type=int, help="samples a step; default 4 on a CPU, 64 on a GPU")
    parser.add_argument("--captions", nargs="+", default=["histogram", "full"], choices=workload.CAPTIONS)
    parser.add_argument("--contenders", nargs="+", choices=contenders.NAMES, help="one group to compare")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the text encoder, as in training")
    parser.add_argument("--minutes", type=float, default=3.5, help="for all comparisons; what is left is not measured")
    parser.add_argument("--seconds", type=float, default=60.0, help="for one comparison at most")
    parser.add_argument("--least", type=int, default=3, help="rounds of a comparison at least")
    parser.add_argument("--warmup", type=int, default=1, help="uncounted steps of each on a CPU, after a first one")
    parser.add_argument("--memory", action="store_true", help="also peak memory, each in a process of its own")
    parser.add_argument("--sizes", action="store_true", help="also samples/s over batch sizes, until memory ends")
    parser.add_argument("--only-sizes", action="store_true", help="these alone")
    parser.add_argument("--sizes-minutes", type=float, default=4.0, help="for all batch sizes")
    parser.add_argument("--profile", action="store_true", help="trace the first contender")
    parser.add_argument("--out", type=measure.folder, help="folder for step.jsonl, step.json, step.md and the profile")
    args = parser.parse_args(argv)
    result = report(args, lambda text: print(text, file=sys.stderr, flush=True))
    write(result, args.out)
    print(json.dumps(result, indent=1) if args.json else render(result))
    return 1 if any("error" in row for row in result["steps"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
