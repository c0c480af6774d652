"""How fast training data come: DALI, Pillow in worker processes, and webdataset with torchvision v2, in turns.

    python -m benchmarks.loader [--json] [--device cpu|cuda] [--size 256] [--batch 32] [--workers 2] [--rounds 7]
                                [--images 600] [--without-randaugment] [--step-ms 250] [--out FILE]

All read the same shards (photographs of scikit-image where it is installed, about 640 x 480) and do the same: random
crop, bicubic resize, mirror, RandAugment, normalisation, caption to masked tokens. Each round starts a loader, lets it
run in, times some batches and ends it, so that none works while another is timed. CPU seconds are those of all its
processes. "readers": DALI's own webdataset reader against the bytes handed in as `albef_ds.data.dali` does, decoding
only. With --step-ms: the share of the time that a step of so many milliseconds waits for its batch. What the machine
does not allow is "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch

from albef_ds.data.augment import TrainTransform
from albef_ds.data.dali_pipeline import dali_available
from albef_ds.data.shard_order import ShardOrder
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.torch_loader import PretrainingLoader
from benchmarks import loader_rivals as rivals
from benchmarks import measure


def contenders(data: rivals.Data, args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Iterator]]:
    """{name: what starts it}; each yields batches of images endlessly."""
    transform = TrainTransform(args.size, randaugment=not args.without_randaugment)
    order = ShardOrder.over(data.shards.corpora, micro_batch=args.batch)
    pillow = PretrainingLoader(
        data.shards, data.tokenizer, transform, micro_batch=args.batch, workers=args.workers, order=order
    )
    found: dict[str, Callable[[], Iterator]] = {}
    if dali_available():
        from albef_ds.data.dali import DaliLoader

        text = TextPipeline(data.tokenizer)
        dali = DaliLoader(data.shards, text, transform, order, workers=args.workers, device=device)
        found[f"dali ({device.type})"] = dali.batches
    found["pillow, workers"] = pillow.batches
    if rivals.webdataset_available():
        found["webdataset, torchvision v2"] = lambda: rivals.webdataset_loader(
            data, transform, args.batch, args.workers
        )
    return found


def compare(starts: dict[str, Callable[[], Iterator]], batch: int, rounds: int, batches: int) -> list[dict]:
    """A row a contender: images/s of each round in turns, CPU seconds an image, ratio to the first one."""
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    cpu: dict[str, list[float]] = {name: [] for name in starts}
    names = list(starts)
    for number in range(rounds + 1):
        for name in names:
            wall, used = timed(starts[name], batches)
            if number:  # the first round is for caches
                seconds[name].append(wall / batches / batch)
                cpu[name].append(used / batches / batch)
        names.reverse()
    first = next(iter(starts))
    rows = []
    for name in starts:
        row = {"loader": name, "images/s": 1 / measure.summary(seconds[name])["median"]}
        row["CPU ms/image"] = 1e3 * measure.summary(cpu[name])["median"]
        row["rounds"] = {"seconds": seconds[name], "cpu_seconds": cpu[name]}
        if name != first:
            faster, cheaper = measure.ratio(seconds[name], seconds[first]), measure.ratio(cpu[name], cpu[first])
            row |= {"first is faster": _interval(faster), "first uses less CPU": _interval(cheaper)}
            row["of"] = {"time": faster, "cpu": cheaper}
        rows.append(row)
    return rows


def timed(start: Callable[[], Iterator], batches: int, run_in: int = 4) -> tuple[float, float]:
    """(wall, CPU seconds of this process and its children) of `batches` batches in the steady state."""
    running = start()
    for _ in islice(running, run_in):
        pass
    wall, used = time.perf_counter(), rivals.cpu_seconds()
    for _ in islice(running, batches):
        pass
    wall, used = time.perf_counter() - wall, rivals.cpu_seconds() - used
    if hasattr(running, "close"):
        running.close()
    return wall, used


def waiting(start: Callable[[], Iterator], step_ms: float, steps: int = 40) -> float:
    """The share of its time that a step waits for its batch."""
    running, waited = start(), 0.0
    next(running)
    began = time.perf_counter()
    for _ in range(steps):
        time.sleep(step_ms / 1e3)
        asked = time.perf_counter()
        next(running)
        waited += time.perf_counter() - asked
    share = waited / (time.perf_counter() - began)
    if hasattr(running, "close"):
        running.close()
    return share


def stages(data: rivals.Data, size: int, rounds: int) -> list[dict]:
    """What one image costs a single thread, stage by stage, each in turns."""
    calls, count = rivals.stage_calls(data, size)
    used: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:
                used[name].append((time.process_time() - began) / count)
    rows = [{"stage": name, "CPU ms/image": 1e3 * measure.summary(times)["median"]} for name, times in used.items()]
    for row in rows:
        row["images/s of a core"] = 1e3 / row["CPU ms/image"]
    return rows


def _interval(ratio: dict) -> str:
    return f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def run(args: argparse.Namespace, folder: Path) -> dict:
    torch.set_num_threads(1)
    device = measure.pick_device(args.device)
    data = rivals.make_data(folder, args.images)
    starts = contenders(data, args, device)
    result = {
        "environment": measure.environment(device),
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "out")},
        "data": {"images": len(data.shards), "bytes an image": data.bytes_per_image, "photographs": data.photographs},
        "loaders": compare(starts, args.batch, args.rounds, args.batches),
        "stages": stages(data, args.size, args.rounds),
        "readers": None,
        "waiting": None,
    }
    if dali_available():
        readers = {
            "bytes handed in": lambda: rivals.handed_in(data, args.batch, args.workers),
            "fn.readers.webdataset": lambda: rivals.dali_reader(data, args.batch, args.workers),
        }
        result["readers"] = compare(readers, args.batch, args.rounds, args.batches)
    if args.step_ms:
        result["waiting"] = {name: waiting(start, args.step_ms) for name, start in starts.items()}
    return result


def report(result: dict) -> str:
    columns = ["loader", "images/s", "CPU ms/image", "first is faster", "first uses less CPU"]
    rows = [{c: row.get(c, "") for c in columns} for row in result["loaders"]]
    parts = [
        f"{result['environment']['device']}; {result['data']}",
        measure.table(rows, columns),
        measure.table(result["stages"], ["stage", "CPU ms/image", "images/s of a core"]),
        "readers: not measured (DALI is not installed)"
        if result["readers"] is None
        else measure.table([{c: row.get(c, "") for c in columns} for row in result["readers"]], columns),
    ]
    waits = result["waiting"]
    told = "not measured (--step-ms)" if waits is None else ", ".join(f"{n} {100 * w:.1f} %" for n, w in waits.items())
    return "\n\n".join([*parts, f"a step waits for its batch: {told}"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description="How fast training data come.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes, or DALI's threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=12, help="timed in each round")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--without-randaugment", action="store_true")
    parser.add_argument("--step-ms", type=float, help="also: how long steps of this length wait")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder))
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
