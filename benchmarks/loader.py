"""How fast training data come: DALI, Pillow in worker processes, and webdataset with torchvision v2, in turns.

    python -m benchmarks.loader [--json] [--device cpu|cuda] [--size 256] [--batch 32] [--workers 2] [--rounds 7]
                                [--images 600] [--without-randaugment] [--step-ms 250] [--out FILE_OR_DIR]
                                [--feed-step [--preset base|small|tiny]] [--lanes LANE ...]

All read the same shards (photographs of scikit-image where it is installed, about 640 x 480) and do the same: random
crop, bicubic resize, mirror, RandAugment, normalisation, caption to masked tokens. Each round starts a loader, lets it
run in, times some batches and ends it, so that none works while another is timed. CPU seconds are those of all its
processes. The lanes:

- decoding: DALI alone, from bytes in memory; on a GPU with other shares of its hardware decoder, too.
- loaders: whole batches.
- feeding, with --feed-step: a training step fed by a loader, in turns with the same step on one resident batch, at the
  preset's image size: the share of its time that is lost to loading, measured.
- waiting, with --step-ms: the share of the time that a step of so many milliseconds waits for its batch.
- readers: DALI's own webdataset reader against the bytes handed in as `albef_ds.data.dali` does, decoding only.
- stages: what an image costs a single thread.

With --out, every row is in FILE's or DIR's .jsonl as soon as it is there, the turns of each round too, and the whole in
the .json at the end. What fails has a row that says so, and the rest goes on; the exit status is then 1. What the
machine does not allow is "not measured".
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
from albef_ds.data.files import write_atomically
from albef_ds.data.shard_order import ShardOrder
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.torch_loader import PretrainingLoader
from benchmarks import PRESETS, measure, workload
from benchmarks import loader_rivals as rivals
from benchmarks.feeding import failure, feed_step, started

Starts = dict[str, Callable[[], Iterator]]  # {name: what starts it}; each yields batches endlessly
LANES = ("decoding", "loaders", "feeding", "waiting", "readers", "stages")  # most valuable first
HARDWARE = (0.65, 1.0, 0.0)  # shares of the hardware decoder: training's, all, none


def loaders(data: rivals.Data, args: argparse.Namespace, device: torch.device, size: int) -> Starts:
    """The project's own, as training builds them."""
    transform = TrainTransform(size, randaugment=not args.without_randaugment)
    order = ShardOrder.over(data.shards.corpora, micro_batch=args.batch)
    shared = {"workers": args.workers, "order": order}
    found: Starts = {}
    if dali_available():
        from albef_ds.data.dali import DaliLoader

        dali = DaliLoader(data.shards, TextPipeline(data.tokenizer), transform, device=device, **shared)
        found[f"dali ({device.type})"] = dali.batches
    pinned = device.type == "cuda"
    found["pillow, workers"] = PretrainingLoader(
        data.shards, data.tokenizer, transform, micro_batch=args.batch, pin_memory=pinned, **shared
    ).batches
    return found


def contenders(data: rivals.Data, args: argparse.Namespace, device: torch.device) -> Starts:
    """The project's loaders and who they are compared with."""
    found = loaders(data, args, device, args.size)
    if rivals.webdataset_available():
        transform = TrainTransform(args.size, randaugment=not args.without_randaugment)
        found["webdataset, torchvision v2"] = lambda: rivals.webdataset_loader(
            data, transform, args.batch, args.workers
        )
    return found


def decoders(data: rivals.Data, args: argparse.Namespace, device: torch.device) -> Starts:
    """DALI alone: on the device, with each share of its hardware decoder, and on the CPU."""
    cpu = torch.device("cpu")
    kinds = {"dali (cpu), crops": (cpu, 0.0)}
    if device.type == "cuda":
        shares = {f"dali (cuda), {100 * share:.0f} % by hardware": (device, share) for share in HARDWARE}
        kinds = shares | kinds

    def start(kind: tuple[torch.device, float]) -> Callable[[], Iterator]:
        return lambda: rivals.decoded(data, args.batch, args.size, args.workers, *kind)

    return {name: start(kind) for name, kind in kinds.items()}


def compare(starts: Starts, batch: int, rounds: int, batches: int) -> Iterator[dict]:
    """Rows: each contender's turn of each round as it ends, then one a contender: images/s, CPU seconds an image, ratio
    to the first one. What fails has a row that says so, and takes part no longer."""
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    cpu: dict[str, list[float]] = {name: [] for name in starts}
    names = list(starts)
    for number in range(rounds + 1):
        for name in names:
            try:
                wall, used = timed(starts[name], batches)
            except Exception as error:
                del seconds[name]
                yield {"loader": name, "error": failure(error)}
                continue
            if number:  # the first round is for caches
                seconds[name].append(wall / batches / batch)
                cpu[name].append(used / batches / batch)
                row = {"loader": name, "round": number, "images/s": 1 / seconds[name][-1]}
                yield row | {"CPU ms/image": 1e3 * cpu[name][-1]}
        names = [name for name in reversed(names) if name in seconds]
    for name in seconds:
        row = {"loader": name, "images/s": 1 / measure.summary(seconds[name])["median"]}
        row["CPU ms/image"] = 1e3 * measure.summary(cpu[name])["median"]
        row["rounds"] = {"seconds": seconds[name], "cpu_seconds": cpu[name]}
        first = next(iter(seconds))
        if name != first:
            faster, cheaper = measure.ratio(seconds[name], seconds[first]), measure.ratio(cpu[name], cpu[first])
            row |= {"first is faster": _interval(faster), "first uses less CPU": _interval(cheaper)}
            row["of"] = {"time": faster, "cpu": cheaper}
        yield row


def timed(start: Callable[[], Iterator], batches: int, run_in: int = 4) -> tuple[float, float]:
    """(wall, CPU seconds of this process and its children) of `batches` batches in the steady state."""
    with started(start) as running:
        for _ in islice(running, run_in):
            pass
        wall, used = time.perf_counter(), rivals.cpu_seconds()
        for _ in islice(running, batches):
            pass
        return time.perf_counter() - wall, rivals.cpu_seconds() - used


def waiting(start: Callable[[], Iterator], step_ms: float, steps: int = 40) -> float:
    """The share of its time that a step waits for its batch."""
    with started(start) as running:
        next(running)
        began, waited = time.perf_counter(), 0.0
        for _ in range(steps):
            time.sleep(step_ms / 1e3)
            asked = time.perf_counter()
            next(running)
            waited += time.perf_counter() - asked
        return waited / (time.perf_counter() - began)


def all_waiting(starts: Starts, step_ms: float) -> Iterator[dict]:
    """A row a loader: its share of waiting, or what it failed of."""
    for name, start in starts.items():
        try:
            yield {"loader": name, "waits": waiting(start, step_ms)}
        except Exception as error:
            yield {"loader": name, "error": failure(error)}


def stages(data: rivals.Data, size: int, rounds: int) -> Iterator[dict]:
    """What one image costs a single thread, stage by stage, each in turns."""
    calls, count = rivals.stage_calls(data, size)
    used: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:
                used[name].append((time.process_time() - began) / count)
    for name, times in used.items():
        row = {"stage": name, "CPU ms/image": 1e3 * measure.summary(times)["median"]}
        yield row | {"images/s of a core": 1e3 / row["CPU ms/image"]}


def _interval(ratio: dict) -> str:
    return f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def lanes(data: rivals.Data, args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Iterator[dict]]]:
    """{lane: what gives its rows}, for those that were asked for and that the machine allows."""

    def compared(starts: Starts) -> Iterator[dict]:
        return compare(starts, args.batch, args.rounds, args.batches)

    def feeding() -> Iterator[dict]:
        config = workload.preset(args.preset)
        fed = loaders(data, args, device, config.vision.image_size)
        return feed_step(fed, config, device, args.batch, args.rounds, args.batches)

    found = {
        "loaders": lambda: compared(contenders(data, args, device)),
        "stages": lambda: stages(data, args.size, args.rounds),
    }
    if dali_available():
        found["decoding"] = lambda: compared(decoders(data, args, device))
        readers = {
            "bytes handed in": lambda: rivals.handed_in(data, args.batch, args.workers),
            "fn.readers.webdataset": lambda: rivals.dali_reader(data, args.batch, args.workers),
        }
        found["readers"] = lambda: compared(readers)
    if args.feed_step:
        found["feeding"] = feeding
    if args.step_ms:
        found["waiting"] = lambda: all_waiting(contenders(data, args, device), args.step_ms)
    return {name: found[name] for name in LANES if name in found and name in args.lanes}


def run(args: argparse.Namespace, folder: Path, rows: measure.Rows) -> dict:
    """All lanes: {lane: its rows without those of single turns; None: not measured}, and what they were run on."""
    torch.set_num_threads(1)
    device = measure.pick_device(args.device)
    data = rivals.make_data(folder, args.images)
    head = {
        "environment": measure.environment(device),
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "out")},
        "data": {"images": len(data.shards), "bytes an image": data.bytes_per_image, "photographs": data.photographs},
    }
    rows.add(head)
    for lane, start in lanes(data, args, device).items():
        try:
            for row in start():
                rows.add({"lane": lane} | row)
        except Exception as error:  # the other lanes' numbers are as good as before
            rows.add({"lane": lane, "error": failure(error)})
    found: dict[str, list[dict] | None] = dict.fromkeys(LANES)
    for row in rows.rows[1:]:
        lane = row["lane"]
        found[lane] = (found[lane] or []) + ([] if "round" in row else [{k: v for k, v in row.items() if k != "lane"}])
    return head | found


COLUMNS = {
    "decoding": ["loader", "images/s", "CPU ms/image", "first is faster", "first uses less CPU"],
    "loaders": ["loader", "images/s", "CPU ms/image", "first is faster", "first uses less CPU"],
    "feeding": ["loader", "samples/s", "lost to loading", "waits"],
    "waiting": ["loader", "waits"],
    "readers": ["loader", "images/s", "CPU ms/image", "first is faster", "first uses less CPU"],
    "stages": ["stage", "CPU ms/image", "images/s of a core"],
}
WANTED = {"feeding": "--feed-step", "waiting": "--step-ms", "decoding": "DALI", "readers": "DALI"}


def report(result: dict) -> str:
    """The result as Markdown."""
    parts = [f"{result['environment']['device']}; {result['data']}"]
    for lane, columns in COLUMNS.items():
        if result[lane] is None:
            parts.append(f"{lane}: not measured ({WANTED.get(lane, '--lanes')})")
            continue
        shown = [row for row in result[lane] if "error" not in row]
        parts += [f"{lane}:\n\n" + measure.table([{c: row.get(c, "") for c in columns} for row in shown], columns)]
        failed = [row for row in result[lane] if "error" in row]
        parts += [f"{lane}: {row.get('loader', 'all of it')} failed: {row['error']}" for row in failed]
    return "\n\n".join(parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.loader", description="How fast training data come.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--device", type=measure.device, help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes, or DALI's threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=12, help="timed in each round")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--without-randaugment", action="store_true")
    parser.add_argument("--step-ms", type=float, help="also: how long steps of this length wait")
    parser.add_argument("--feed-step", action="store_true", help="also: what a training step loses to loading")
    parser.add_argument("--preset", default="base", choices=PRESETS, help="of that step's model")
    parser.add_argument("--lanes", nargs="+", choices=LANES, default=LANES, help="no others")
    parser.add_argument("--out", type=Path, help="also write there: FILE.json and FILE.jsonl, or both in a folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    out = args.out
    if out and (out.is_dir() or not out.suffix):
        out = out / "loader.json"
    rows = measure.Rows(out and out.with_suffix(".jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, Path(folder), rows)
    text = json.dumps(result, indent=1)
    if out:
        write_atomically(out.with_suffix(".json"), text + "\n")
    print(text if args.json else report(result))
    return 1 if any("error" in row for row in rows.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
