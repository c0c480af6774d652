"""What a checkpoint costs training: seconds that the step waits when it is written in the background, and when not.

    python -m benchmarks.checkpoint [--json] [--device cpu] [--size small|base] [--saves 5] [--folder DIR]

One rank, ALBEF of the given size with its optimiser; every save goes to DIR (default: a temporary folder). `blocked_s`
is what the loop waits for `Checkpoints.save`, `write_s` how long the files take, both medians over the saves; the ratio
is what of a whole save is left in the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from albef_ds.config import BatchPlan, CheckpointConfig, ModelConfig, OptimizerConfig, TextConfig, VisionConfig
from benchmarks import measure

SIZES = {
    "small": ModelConfig(
        vision=VisionConfig(image_size=64, width=256, layers=4, heads=4),
        text=TextConfig(vocab_size=8192, width=256, layers=4, fusion_layer=2, heads=4, mlp_width=1024),
        queue_size=4096,
    ),
    "base": ModelConfig(text=TextConfig(vocab_size=30522)),
}


def build(size: str, device: str):
    from albef_ds.tasks.pretraining import Pretraining
    from albef_ds.training.engine import build_engine, engine_config, init_distributed

    init_distributed()
    torch.manual_seed(0)
    task = Pretraining(SIZES[size]).to(device)
    plan = BatchPlan(global_batch=1, micro_batch=1, accumulation=1, world_size=1)
    return build_engine(task, OptimizerConfig(), engine_config({"zero_optimization": {"stage": 2}}, plan, clip=0.0))


def time_saves(engine, folder: Path, saves: int, background: bool) -> dict[str, float]:
    """Medians over `saves` saves; the first, which takes the memory for the copies, is left out."""
    from albef_ds.training.checkpoint import Checkpoints

    settings = CheckpointConfig(keep=1, background=background)
    checkpoints = Checkpoints(folder, settings, identity={})
    blocked = []
    for step in range(1, saves + 2):
        start = time.perf_counter()
        checkpoints.save(engine, step)
        blocked.append(time.perf_counter() - start)
        checkpoints.wait()  # the steps between two saves take longer than writing
    checkpoints.finish()
    return {
        "blocked_s": statistics.median(blocked[1:]),
        "write_s": statistics.median(timing.write_s for timing in checkpoints.timings[1:]),
        "gb": checkpoints.timings[-1].bytes / 1e9,
    }


def main(argv: list[str] | None = None) -> int:
    from albef_ds.training.engine import leave_distributed

    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", type=measure.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    args = parser.parse_args(argv)
    engine = build(args.size, args.device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = {
            name: time_saves(engine, Path(folder) / name, args.saves, background)
            for name, background in (("background", True), ("waiting", False))
        }
    engine.destroy()
    leave_distributed()
    ratio = found["background"]["blocked_s"] / found["waiting"]["blocked_s"]
    result = {"size": args.size, "device": args.device, "saves": args.saves, **found, "ratio": ratio}
    if args.json:
        print(json.dumps(result))
    else:
        for name in ("background", "waiting"):
            print(f"{name:>10}: the step waits {found[name]['blocked_s']:.3f} s of {found[name]['gb']:.2f} GB's saving")
        print(f"     ratio: {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
