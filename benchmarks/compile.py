"""Training steps of ours with compiled regions and without, in turns, over batches of differing lengths.

    python -m benchmarks.compile [--json] [--device cpu|cuda] [--sizes demo base] [--batch N] [--seconds 60] [--out DIR]

"ratio" is compiled over eager time, the median of pairs (A B B A) with its 95 % bootstrap interval: below 1 pays.
"cpu time" is the same of processor time, which a busy neighbour takes less away from.
"graphs" are those of the first step; "recompilations" what the other lengths added; "breaks" calls that left a graph.
CUDA graphs are not measured: packed batches have a shape of their own each step, which a graph would have to be
recorded for, and there was no GPU to try it on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from dataclasses import dataclass

import torch
from torch._dynamo.utils import counters

from albef_ds.config import ModelConfig, load_config
from albef_ds.training.compile import compile_regions
from benchmarks import contenders, measure, step, workload

SIZES = ("demo", "base", "small", "tiny")
BATCH = {"demo": 32, "base": 4, "small": 4, "tiny": 4}  # samples a forward pass, on a CPU
COLUMNS = [
    "size",
    "batch",
    "ratio",
    "low",
    "high",
    "pairs",
    "cpu time",
    "graphs",
    "breaks",
    "recompilations",
    "CUDA graphs",
]


def model_of(size: str) -> ModelConfig:
    """A preset of the workload, or the demo's model."""
    if size != "demo":
        return workload.preset(size)
    model = load_config("demo").model
    return model.model_copy(update={"text": model.text.model_copy(update={"vocab_size": 200})})


@dataclass(frozen=True)
class Graphs:
    """What torch.compile has made so far in this process."""

    graphs: int
    breaks: int

    @classmethod
    def now(cls) -> Graphs:
        return cls(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


def compare(size: str, device: torch.device, batch: int, seconds: float, least: int, lengths: int) -> dict:
    """One row: both contenders go through the same `lengths` batches, each of other captions, over and over."""
    torch._dynamo.reset()
    counters.clear()
    config = model_of(size)
    batches = [workload.captions_batch(config, "histogram", batch, seed) for seed in range(lengths)]
    built = {name: contenders.build("ours bf16", config, device, batches[0]) for name in ("eager", "compiled")}
    compile_regions(built["compiled"].model)

    start = time.monotonic()
    built["compiled"]()
    first, compiling = Graphs.now(), time.monotonic() - start
    used: dict[str, list[float]] = {name: [] for name in built}
    calls = {name: step.with_cpu_time(over(contender, batches), used[name]) for name, contender in built.items()}
    for _ in batches:
        calls["compiled"]()
    last = Graphs.now()
    samples = measure.interleaved(calls, device, seconds, least=least, warmup=1)
    ratio = measure.ratio(samples["compiled"], samples["eager"])
    counted = {name: times[-len(samples[name]) :] for name, times in used.items()}
    return {
        "size": size,
        "batch": batch,
        "ratio": ratio.pop("median"),
        **ratio,
        "cpu time": measure.ratio(counted["compiled"], counted["eager"]),
        "graphs": first.graphs,
        "breaks": last.breaks,
        "recompilations": last.graphs - first.graphs,
        "first step s": compiling,
        "ms": {name: measure.summary(times) for name, times in samples.items()},
        "CUDA graphs": None,
    }


def over(contender: contenders.Contender, batches: list):
    """A step on the next batch."""
    turn = itertools.cycle(batches)

    def call() -> None:
        contender.set_batch(next(turn))
        contender()

    return call


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--device", type=measure.device)
    parser.add_argument("--sizes", nargs="+", default=["demo", "base"], choices=SIZES)
    parser.add_argument("--batch", type=int, help="samples a step; default 32 of the demo's, 4 of others, on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="for one size, compiling not counted")
    parser.add_argument("--least", type=int, default=6, help="rounds of a size at least")
    parser.add_argument("--lengths", type=int, default=6, help="batches of differing lengths")
    parser.add_argument("--out", type=measure.folder, help="folder that keeps each size as soon as it is measured")
    args = parser.parse_args(argv)
    device = measure.pick_device(args.device)
    kept = measure.Rows(args.out and args.out / "compile.jsonl")
    for size in args.sizes:
        batch = args.batch or (BATCH[size] if device.type == "cpu" else 64)
        kept.add(compare(size, device, batch, args.seconds, args.least, args.lengths))
        gc.collect()
    rows = kept.rows
    shown = [{**row, "cpu time": "{median:.3f} ({low:.3f} to {high:.3f})".format(**row["cpu time"])} for row in rows]
    result = {"environment": measure.environment(device), "steps": rows, "not measured": ["CUDA graphs"]}
    print(json.dumps(result, indent=1) if args.json else measure.table(shown, COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
