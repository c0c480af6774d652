"""Starts real training processes on a tiny recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from albef_ds.data.shapes_world import write_shapes_world
from albef_ds.training.rendezvous import free_port

ROOT = Path(__file__).parent.parent


def write_recipe(folder: Path, **sections) -> Path:
    """A tiny recipe on a tiny Shapes World, dropout on; `sections` update its sections."""
    world = write_shapes_world(folder / "data", images=120, test_images=16, seed=1, size=48)
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {
            "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
            "text": {"width": 32, "layers": 2, "fusion_layer": 1, "heads": 2, "mlp_width": 64, "max_positions": 32},
            "embed_dim": 16,
            "queue_size": 50,  # no multiple of the batch
        },
        "data": {"train": [str(world.train)], "tokenizer": str(world.vocab), "workers": 0},
        "optimizer": {"lr": 1e-3},
        "schedule": {"name": "paper", "warmup_steps": 3},
        "train": {"max_steps": 13, "global_batch": 24, "micro_batch": 6, "clip": 1.0, "deepspeed": "zero2_cpu"},
        "checkpoint": {"every": 4, "keep": 2},
        "log": {"every": 1, "report": False},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_training(arguments: list[str], ranks: int = 2, kill: tuple[str, int, int] | None = None, timeout: float = 300):
    """Starts the ranks; (exit codes, output of all). Once one dies of the `kill`, the others are killed too, as the
    launcher does."""
    moment, rank, step = kill or ("never", -1, 0)
    port = str(free_port())
    command = [sys.executable, "-m", "tests.training.interrupted", moment, str(rank), str(step), "--", *arguments]
    processes = []
    for i in range(ranks):
        env = {
            **os.environ,
            "RANK": str(i),
            "LOCAL_RANK": str(i),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    deadline = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        if any(p.poll() not in (None, 0) for p in processes):
            time.sleep(2 if kill is None else 0.2)  # the others may be about to say why they stop
            break
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    outputs = [p.communicate()[0] for p in processes]
    return [p.returncode for p in processes], "\n".join(outputs)


def metrics(folder: Path) -> dict[int, dict]:
    """What metrics.jsonl says of each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step stands there twice"
    return {line["step"]: line for line in lines}
