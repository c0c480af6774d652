"""Trains for long and looks for what grows: memory, open files, threads, processes, disk.

    python -m benchmarks.soak --minutes 30 [--out soak.json] [--json]

The demo's model on Shapes World, two ranks, started as `make demo` starts it, with a checkpoint every 50 steps. The
run's folder and each rank, with its loader's processes, are looked at from outside. Of memory the least within half a
minute counts: what is held between two steps, after what was freed has been given back (every `log.every` steps).
Within a step it swings by half a gigabyte, in which no leak can be seen. After a third of the time, and three minutes
at least (the first checkpoint, caches, batches of every length), a straight line through what is left must not rise by
more than LIMITS; exit status 1 if one does, or if the run ends before its time or is too short.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from albef_ds.data.shapes_world import write_shapes_world
from albef_ds.demo import CPU_RANKS, environment, machine
from albef_ds.training.rendezvous import free_port
from benchmarks import measure

# What a quantity may rise in an hour, as a share of its mean, and at least in its own unit over the time watched.
LIMITS = {"rss_mib": (0.05, 16.0), "files": (0.0, 2.0), "threads": (0.0, 2.0), "processes": (0.0, 1.0)}
LIMITS["disk_mib"] = (0.05, 40.0)  # metrics and events grow; checkpoints come and go
WARM_UP = 180.0  # seconds at least
POLL = 0.05  # seconds between two looks at memory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description="Looks for what grows while training.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=30, help="seconds between two samples, log.every steps at least")
    parser.add_argument("--out", type=Path, help="the JSON's file")
    parser.add_argument("--json", action="store_true", help="print it")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), 60 * args.minutes, args.every)
    result = {"environment": measure.environment(measure.pick_device()), "minutes": args.minutes, **result}
    text = as_text(result)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text if args.json else "\n".join(f"{k:28} {v['verdict']}" for k, v in result["judged"].items()))
    return 0 if result["passed"] else 1


def as_text(result: dict) -> str:
    """JSON with a line a sample."""
    samples = ",\n".join(f"  {json.dumps(sample)}" for sample in result["samples"])
    head = json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1)
    return f'{head.removesuffix("}").rstrip()},\n "samples": [\n{samples}\n ]\n}}\n'


def soak(folder: Path, seconds: float, every: float) -> dict:
    """{"passed", "ended_early", "steps", "judged", "samples"}; the time counts from the first training step."""
    world = write_shapes_world(folder / "data", 1000, 16, seed=0)
    run = folder / "run"
    settings = [f"data.train=[{world.train}]", "data.shards=[]", "data.test=null", f"data.tokenizer={world.vocab}"]
    settings += [f"output_dir={run}", f"train.deepspeed={machine()}", "train.max_steps=10000000"]
    settings += ["train.epochs=10000000", "checkpoint.every=50", "log.report=false"]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_gpus", str(CPU_RANKS), "--master_port", str(free_port()), "--module", "albef_ds.train"]
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            [*command, "demo", *settings], env=environment(CPU_RANKS), stdout=output, stderr=subprocess.STDOUT
        )
    samples: list[dict] = []
    try:
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
            if process.poll() is not None:
                raise RuntimeError(f"training ended at once:\n{(folder / 'output.txt').read_text()[-3000:]}")
            time.sleep(0.5)
        start = time.monotonic()
        while (now := time.monotonic() - start) < seconds and process.poll() is None:
            ranks = look(process.pid, every)
            samples.append({"seconds": round(now, 1), "disk_mib": disk_mib(run), "ranks": ranks})
        early = process.poll() is not None
        whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()  # the last may be half written
        steps = json.loads(whole[-1])["step"] if whole else 0
    finally:
        end(process)
    series = series_of(samples)
    judged = {
        name: judge(name.rsplit(".", 1)[-1], points, max(seconds / 3, WARM_UP)) for name, points in series.items()
    }
    passed = not early and all(j["passed"] for j in judged.values())
    return {"passed": passed, "ended_early": early, "steps": steps, "judged": judged, "samples": samples}


def look(pid: int, seconds: float) -> list[dict]:
    """What each rank holds, its loader's processes included; of memory the least within the next `seconds`."""
    try:
        launcher = next(p for p in psutil.Process(pid).children() if "deepspeed.launcher.launch" in p.cmdline())
        families = [[rank, *rank.children(recursive=True)] for rank in launcher.children()]
        counts = [
            {
                "files": sum(p.num_fds() for p in family),
                "threads": sum(p.num_threads() for p in family),
                "processes": len(family),
            }
            for family in families
        ]
        memory = least(lambda: [sum(p.memory_info().rss for p in family) for family in families], seconds)
    except (StopIteration, psutil.NoSuchProcess):
        time.sleep(POLL)
        return []  # it is ending
    return [{"rss_mib": round(m / 2**20, 1), **c} for m, c in zip(memory, counts, strict=True)]


def least(measure: Callable[[], list[int]], seconds: float) -> list[int]:
    """The least of each number that `measure` returns again and again."""
    found, start = measure(), time.monotonic()
    while time.monotonic() - start < seconds:
        time.sleep(POLL)
        found = [min(pair) for pair in zip(found, measure(), strict=True)]
    return found


def disk_mib(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a checkpoint that has just gone
            continue
    return round(total / 2**20, 1)


def series_of(samples: Sequence[dict]) -> dict[str, list[tuple[float, float]]]:
    """Name of a quantity to its (seconds, value)."""
    series: dict[str, list] = {}
    for sample in samples:
        series.setdefault("disk_mib", []).append((sample["seconds"], sample["disk_mib"]))
        for i, rank in enumerate(sample["ranks"]):
            for name, value in rank.items():
                series.setdefault(f"rank_{i}.{name}", []).append((sample["seconds"], value))
    return series


def judge(name: str, points: Sequence[tuple[float, float]], warm_up: float) -> dict:
    """Least-squares slope of the points after the warm-up against the quantity's limit."""
    late = [p for p in points if p[0] >= warm_up]
    if len(late) < 3:
        return {"passed": False, "verdict": "too few looks to judge: run for longer"}
    mean_t, mean_v = (sum(column) / len(late) for column in zip(*late, strict=True))
    spread = sum((t - mean_t) ** 2 for t, _ in late)
    slope = sum((t - mean_t) * (v - mean_v) for t, v in late) / spread
    watched = late[-1][0] - late[0][0]
    share, least = LIMITS[name]
    limit = max(share * mean_v * watched / 3600, least)
    rise = slope * watched
    verdict = f"{mean_v:.1f} on average, {rise:+.2f} in {watched:.0f} s; allowed {limit:.2f}"
    return {"passed": rise <= limit, "mean": mean_v, "rise": rise, "limit": limit, "verdict": verdict}


def end(process: subprocess.Popen) -> None:
    """Kills the launcher and what it started."""
    if process.poll() is not None:
        return
    for child in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        try:
            os.kill(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
