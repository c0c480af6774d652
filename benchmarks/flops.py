"""FLOPs a sample, ours and the reference's, forward and backward, on the same batch.

    python -m benchmarks.flops [--json] [--batch 8] [--preset base]

Counted operator by operator (benchmarks/counting.py), not calculated. The head numbers are for 8 captions with a mean
of 14 of 25 tokens, the longest full; "full": all captions full; "histogram": captions drawn from the histogram, where
the reference pads to the longest of its batch. Fused attention (ours) counts what it recomputes, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial

import torch

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PretrainingBatch
from albef_ds.tasks.pretraining import Pretraining
from benchmarks import PRESETS, measure, workload
from benchmarks.counting import count_flops
from benchmarks.reference import PaddedBatch, ReferenceALBEF

ALPHA = 0.4
DRAWS = 3  # batches drawn from the histogram


def next_one(logits: torch.Tensor) -> torch.Tensor:
    """Row i's negative is i + 1: every text and image serves once, as on average."""
    return (torch.arange(logits.shape[0], device=logits.device) + 1) % logits.shape[0]


def narrowed(config: ModelConfig) -> ModelConfig:
    """The same depth, heads and lengths at 4 numbers a head, with a small queue: quick to run really."""
    vision, text = config.vision, config.text
    return config.model_copy(
        update={
            "vision": vision.model_copy(update={"width": 4 * vision.heads}),
            "text": text.model_copy(update={"width": 4 * text.heads, "mlp_width": 8 * text.heads}),
            "queue_size": 64 * 16,
        }
    )


def ours(config: ModelConfig, batch: PretrainingBatch):
    task = Pretraining(config, sample_negatives=next_one).train()

    def step():
        task.start_step(ALPHA)
        sum(task(batch).values()).backward()
        task.finish_step()

    return task, step


def reference(config: ModelConfig, batch: PaddedBatch):
    model = ReferenceALBEF(config, choose=lambda weights: 0).train()

    def step():
        sum(model(batch, ALPHA).values()).backward()

    return model, step


def per_sample(config: ModelConfig, lengths: list[int]) -> dict:
    """{"ours", "reference"}: FLOPs a sample; "ratio"."""
    found, packed = {}, workload.make_batch(config, lengths)
    for name, build, batch in (("ours", ours, packed), ("reference", reference, PaddedBatch.from_packed(packed))):
        found[name] = count_flops(partial(build, batch=batch), config, narrowed(config)) / len(lengths)
    return {**found, "ratio": found["ours"] / found["reference"]}


def report(preset: str = "base", batch: int = 8) -> dict:
    """The head case flat, the other cases under their names."""
    config = workload.preset(preset)
    drawn = [per_sample(config, workload.lengths_of("histogram", batch, seed)) for seed in range(DRAWS)]
    histogram = {name: statistics.fmean(case[name] for case in drawn) for name in ("ours", "reference")}
    histogram["ratio"] = histogram["ours"] / histogram["reference"]
    return {
        **per_sample(config, workload.lengths_of("mean14", batch)),
        "unit": "FLOP a sample, forward and backward",
        "full": per_sample(config, workload.lengths_of("full", batch)),
        "histogram": histogram,
        "conditions": {
            "preset": preset,
            "batch": batch,
            "mean14 lengths": workload.lengths_of("mean14", batch),
            "histogram batches": DRAWS,
            "packages": {"torch": measure.package_version("torch")},
            "commit": measure.commit(),
        },
    }


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--preset", default="base", choices=PRESETS)
    args = parser.parse_args(argv)
    found = report(args.preset, args.batch)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    cases = {"mean of 14 tokens": found, "all full": found["full"], "histogram": found["histogram"]}
    rows = [
        {
            "captions": name,
            "ours GFLOP": case["ours"] / 1e9,
            "reference GFLOP": case["reference"] / 1e9,
            "ratio": case["ratio"],
        }
        for name, case in cases.items()
    ]
    print(measure.table(rows, list(rows[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
