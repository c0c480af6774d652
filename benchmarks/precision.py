"""Which of DeepSpeed's precision modes carries ALBEF: `python -m benchmarks.precision [--steps 60] [--json]`.

Trains the same small model on the same batches three ways and compares:
    fp32            parameters and arithmetic in fp32: the truth
    torch_autocast  fp32 parameters, bf16 arithmetic
    bf16            bf16 parameters (DeepSpeed casts every one, frozen ones too) over fp32 masters

What counts: how far the losses stray from fp32, how far the teacher moves of the way that it should, where the
temperature ends, what a rank keeps resident for every parameter, and the time of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from albef_ds.build import build_task, with_vocabulary
from albef_ds.config import BatchPlan, OptimizerConfig, load_config
from albef_ds.data.annotations import read_pairs
from albef_ds.data.augment import TrainTransform
from albef_ds.data.shapes_world import write_shapes_world
from albef_ds.data.tokenizer import load_tokenizer
from albef_ds.data.torch_loader import PretrainingLoader
from albef_ds.train import seed_all
from albef_ds.training.engine import build_engine, clamp_temperature, engine_config, init_distributed, leave_distributed

BATCH = 16
MODES = {
    "fp32": {},
    "torch_autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


def run(mode: str, config, batches: list, device: torch.device, lr: float) -> dict:
    seed_all(0)
    task = build_task(config).to(device)
    json_config = {"zero_optimization": {"stage": 2, "contiguous_gradients": True}, **MODES[mode]}
    plan = BatchPlan(global_batch=BATCH, micro_batch=BATCH, accumulation=1, world_size=1)
    engine = build_engine(task, OptimizerConfig(lr=lr), engine_config(json_config, plan, clip=0.0))
    images_as = torch.bfloat16 if mode == "bf16" else torch.float32  # bf16 parameters take bf16 inputs only
    start = {n: p.detach().float().clone() for n, p in task.teacher.named_parameters()}
    losses, seconds = [], []
    for batch in batches:
        began = time.perf_counter()
        batch = batch.to(device)
        batch = type(batch)(batch.images.to(images_as), batch.text, batch.masked)
        task.start_step(alpha=0.4)
        found = engine(batch)
        engine.backward(sum(found.values()))
        engine.step()
        task.finish_step(engine.was_step_applied())
        clamp_temperature(engine)
        losses.append(float(sum(found.values()).detach()))
        seconds.append(time.perf_counter() - began)
    engine.destroy()
    moved = {n: (p.detach().float() - start[n]) for n, p in task.teacher.named_parameters()}
    trained = sum(p.numel() for p in task.model.parameters())
    frozen = sum(p.numel() for p in task.teacher.parameters())
    resident = sum(p.numel() * p.element_size() for m in (task.model, task.teacher) for p in m.parameters())
    return {
        "losses": losses,
        "moved": moved,
        "temperature": float(task.model.temp.detach().float()),
        "bytes_a_parameter": resident / (trained + frozen),
        "seconds": statistics.median(seconds[2:]),
    }


def measure(steps: int, lr: float, data: Path) -> dict:
    world = write_shapes_world(data, images=max(256, BATCH * steps), test_images=16, seed=0)
    tokenizer = load_tokenizer(world.vocab)
    config = with_vocabulary(load_config("demo", [f"data.tokenizer={world.vocab}"]), tokenizer.vocab_size)
    transform = TrainTransform(64, scale=(0.8, 1.0), horizontal_flip=False, randaugment=False)
    loader = PretrainingLoader(read_pairs([world.train]), tokenizer, transform, micro_batch=BATCH).batches()
    batches = [next(loader) for _ in range(steps)]
    device = init_distributed()[2]
    results = {mode: run(mode, config, batches, device, lr) for mode in MODES}
    truth = results["fp32"]
    way = sum(float(m.square().sum()) for m in truth["moved"].values())
    table = {}
    for mode, found in results.items():
        along = sum(float((found["moved"][n] * m).sum()) for n, m in truth["moved"].items())
        stray = [abs(a - b) / b for a, b in zip(found["losses"], truth["losses"], strict=True)]
        table[mode] = {
            "loss_deviation_mean": statistics.mean(stray),
            "loss_deviation_max": max(stray),
            "teacher_way": along / way,
            "temperature": found["temperature"],
            "bytes_a_parameter": found["bytes_a_parameter"],
            "ms_a_step": 1000 * found["seconds"],
        }
    return {"device": str(device), "steps": steps, "lr": lr, "torch": torch.__version__, "modes": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--data", type=Path, default=Path("runs/precision"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.steps, args.lr, args.data)
    leave_distributed()
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['device']}, {result['steps']} steps, lr {result['lr']}")
    print(
        f"{'mode':15} {'loss off by':>20} {'teacher moved':>14} {'temperature':>12} {'bytes/param':>12} {'ms/step':>8}"
    )
    for mode, row in result["modes"].items():
        off = f"{row['loss_deviation_mean']:.2%} (max {row['loss_deviation_max']:.2%})"
        print(
            f"{mode:15} {off:>20} {row['teacher_way']:>14.1%} {row['temperature']:>12.6f} "
            f"{row['bytes_a_parameter']:>12.1f} {row['ms_a_step']:>8.0f}"
        )


if __name__ == "__main__":
    main()
