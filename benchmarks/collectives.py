"""Collectives and bytes of one optimiser step under DeepSpeed, counted as one rank of many sees them.

    python -m benchmarks.collectives [--world 8] [--preset tiny] [--deepspeed zero2_a100_80gb] [--stage 2]

The ranks are made up: PyTorch's "fake" process group answers every collective at once with nothing. What the step asks
for is counted, what comes back is not looked at, so losses mean nothing here. It runs on the CPU wherever it is
started, so that a machine with a GPU counts what one without counts.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

CONFIGURATIONS = Path(__file__).resolve().parent.parent / "ds_configs"
MICRO = 8
# Read when DeepSpeed is imported, and when PyTorch first looks for a GPU.
CPU_ALONE = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def count(world: int, preset: str, deepspeed_json: dict) -> dict:
    """Joins a made-up group of `world` ranks and counts the second step. Once a process: the group stays.

    Raises:
        RuntimeError: DeepSpeed was imported before, and has chosen a GPU.
    """
    os.environ.update(CPU_ALONE)
    import torch
    from deepspeed.accelerator import get_accelerator

    from albef_ds.config import BatchPlan, OptimizerConfig
    from albef_ds.tasks.pretraining import Pretraining
    from albef_ds.training.engine import build_engine, clamp_temperature, engine_config
    from benchmarks import fake_ranks, flops, workload
    from benchmarks.counting import OperatorCount

    accelerator = get_accelerator().device_name()
    if accelerator != "cpu":
        raise RuntimeError(
            f"collectives are counted on the CPU, and DeepSpeed has chosen {accelerator} before: use a new process"
        )
    fake_ranks.join(0, world)
    plan = BatchPlan(global_batch=MICRO * world, micro_batch=MICRO, accumulation=1, world_size=world)
    config = workload.preset(preset)
    torch.manual_seed(0)
    task = Pretraining(config, sample_negatives=flops.next_one)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    engine = build_engine(task, OptimizerConfig(), engine_config(deepspeed_json, plan, clip=0.0))
    batch = workload.captions_batch(config, "mean14", MICRO)

    def step() -> None:
        task.start_step(0.4)
        losses = engine(batch)
        engine.backward(sum(losses.values()))
        engine.step()
        task.finish_step()
        clamp_temperature(engine)

    step()
    with OperatorCount() as counted:
        step()
    return {
        "world": world,
        "accelerator": accelerator,
        "collectives": dict(sorted(counted.collectives.items())),
        "collectives a step": sum(counted.collectives.values()),
        "bytes a step": counted.collective_bytes,
        "trained parameters": trained,
        "host syncs": counted.host_syncs,
    }


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--preset", default="tiny", choices=("base", "small", "tiny"))
    parser.add_argument("--deepspeed", default="zero2_a100_80gb", help="name of a file in ds_configs")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="in place of the file's")
    args = parser.parse_args(argv)
    given = json.loads((CONFIGURATIONS / f"{args.deepspeed}.json").read_text())
    given.pop("_comment", None)
    given["zero_optimization"]["stage"] = args.stage or given["zero_optimization"]["stage"]
    given["zero_optimization"]["overlap_comm"] = False  # the CPU has no second stream to overlap on
    print(json.dumps(count(args.world, args.preset, given)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
