"""The demo: makes Shapes World, starts the deepspeed launcher on the recipe demo.yaml, and says what came out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from albef_ds import optional
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.shapes_world import write_shapes_world
from albef_ds.training.rendezvous import free_port

IMAGES, TEST_IMAGES, SEED = 8000, 256, 0
CPU_RANKS = 2


def demo(output: Path, ranks: int | None = None, overrides: Sequence[str] = ()) -> int:
    """Runs all of it; returns the launcher's exit status."""
    started = time.perf_counter()
    world = write_shapes_world(output / "data", IMAGES, TEST_IMAGES, seed=SEED)
    shards = output / "shards"
    pack([world.train], shards, PackSettings(samples_per_shard=500))
    print(f"data: {IMAGES} training and {TEST_IMAGES} test images, {time.perf_counter() - started:.0f} s")
    paths = [f"data.shards=[{shards}]", f"data.test={world.test}", f"data.tokenizer={world.vocab}"]
    status = launch("demo", [f"output_dir={output}", *paths, *overrides], ranks)
    if status == 0:
        print(summary(output, time.perf_counter() - started))
    return status


def launch(recipe: str, settings: Sequence[str], ranks: int | None = None) -> int:
    """Trains a recipe under the deepspeed launcher, on the GPUs there are or on the CPU; returns its exit status."""
    ranks = ranks or torch.cuda.device_count() or CPU_RANKS
    # The launcher itself, not its script: that lies elsewhere where packages are installed into a folder of their own.
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    deepspeed += ["--master_port", str(free_port())]
    command = [*deepspeed, "--module", "albef_ds.train", recipe, f"train.deepspeed={machine()}", *settings]
    return subprocess.run(command, env=environment(ranks)).returncode


def machine() -> str:
    """The DeepSpeed configuration that fits what is here."""
    if torch.cuda.is_available():
        return "zero2_a100_40gb"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # PyTorch has no public name for them
    has_bf16 = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return "zero2_cpu_bf16" if has_bf16 else "zero2_cpu"


def environment(ranks: int) -> dict[str, str]:
    """Without a GPU: DeepSpeed told so, cores divided among the ranks, and tcmalloc loaded where it is installed."""
    env = dict(os.environ)
    # DeepSpeed builds its operators with the tools of this environment (ninja), whether or not it is activated.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or ranks) // ranks)))
        if (allocator := optional.tcmalloc()) and "malloc" not in (loaded := env.get("LD_PRELOAD", "")):
            env["LD_PRELOAD"] = f"{loaded}:{allocator}".lstrip(":")
    return env


def summary(output: Path, seconds: float) -> str:
    found = json.loads((output / "summary.json").read_text())
    rate = found["samples_per_s"]  # None where the run was over before it could be timed
    speed = "" if rate is None else f", {rate:.0f} samples/s"
    lines = [f"demo: {found['steps']} steps{speed}, {seconds:.0f} s in all"]
    for name, label in (("itc", "ITC alone"), ("itm", "re-ranked by ITM")):
        scores = found["retrieval"][name]
        lines.append(
            f"  {label:17} TR@1 {scores['tr@1']:5.1f}  TR@10 {scores['tr@10']:5.1f}   "
            f"IR@1 {scores['ir@1']:5.1f}  IR@10 {scores['ir@10']:5.1f}"
        )
    return "\n".join([*lines, f"  report:     {output / 'report.html'}", f"  checkpoint: {output / 'checkpoints'}"])
