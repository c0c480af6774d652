"""Communication and memory of many GPUs.

    python -m benchmarks.scaling [--json] [--out DIR] [--preset base] [--batch 64] [--step-ms MS] [--step-json FILE]

For 8 to 512 A100s in nodes of 8, ZeRO-1 and 2 with our settings: fp32 gradients, fp32 parameters. The bytes are COUNTED
by a dry run of every case (benchmarks.collectives), as what a rank sends in a ring; those on paper, from the model's
sizes, stand beside them, and where the two differ it is said. Times are CALCULATED from the bytes and the data sheet's
link rates, memory from the model's sizes. A single GPU's step time is taken from a measurement (`--step-ms`, or
`--step-json` of benchmarks.step on that GPU) or is not there. Without it compute is only bounded from below, by the
counted FLOPs at the data sheet's peak; no efficiency is then given.

DeepSpeed sums gradients by "allreduce" unless its configuration sets `use_multi_rank_bucket_allreduce: false`; then
each rank receives its own share alone ("scatter"), by a collective for every rank and bucket. Memory is the model's
state alone, without activations and buckets.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from albef_ds.config import ModelConfig
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.training.peak_flops import peak_flops_by_name
from benchmarks import PRESETS, collectives, flops, measure, workload

WORLDS = (8, 16, 32, 64, 128, 256, 512)
NODE = 8
GIB = 2**30
# One direction, bytes/s, from the data sheet of the DGX A100: NVLink 600 GB/s a GPU both ways; 8 cards of 200 Gbit/s a
# node. Rings cross a node's border once each and share its cards, so a rank's bytes flow at the node's rate.
LINKS = {"NVLink": 300e9, "InfiniBand of a node": 200e9}
CHIP = "A100"
CONFIGURATION = "zero2_a100_80gb"
SENT = ("gradients", "parameters", "features")
REDUCE = ("allreduce", "scatter")
TOLERANCE = 1e-3  # share of the bytes on paper by which the counted ones may differ unsaid


@dataclass(frozen=True)
class Sizes:
    """What communication and memory depend on. Numbers of elements, fp32 throughout."""

    trained: int
    teacher: int
    queue: int
    embed_dim: int


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a step, ring algorithms assumed."""

    gradients: float
    parameters: float  # updated
    features: float  # the teacher's, for the queues
    collectives: int | None = None  # how many there are; None: not counted

    def differences(self, paper: Sent) -> list[str]:
        """What of this is not what is on paper, in words."""
        pairs = {name: (getattr(self, name), getattr(paper, name)) for name in SENT}
        return [
            f"{name}: {here:.0f} bytes counted, {there:.0f} on paper"
            for name, (here, there) in pairs.items()
            if abs(here - there) > TOLERANCE * there
        ]


@dataclass(frozen=True)
class Row:
    """One number of GPUs under one stage; bytes as in `Sent`."""

    world: int
    stage: int
    collectives: int | None
    reduce_bytes: float  # gradients
    gather_bytes: float  # parameters
    feature_bytes: float
    parameters_gib: float
    teacher_gib: float
    gradients_gib: float
    optimizer_gib: float
    queue_gib: float
    communication_ms: float  # all of the bytes over the slowest link at its nominal rate
    compute_ms: float | None  # measured on one GPU
    efficiency_none_hidden: float | None  # if no communication overlaps compute
    efficiency_reduce_hidden: float | None  # if the gradients' part overlaps the backward pass wholly

    @property
    def state_gib(self) -> float:
        return self.parameters_gib + self.teacher_gib + self.gradients_gib + self.optimizer_gib + self.queue_gib


def sizes_of(config: ModelConfig) -> Sizes:
    with torch.device("meta"):
        task = Pretraining(config)
    return Sizes(
        trained=sum(p.numel() for p in task.model.parameters()),
        teacher=sum(p.numel() for p in task.teacher.parameters()),
        queue=task.queue.image.numel() + task.queue.text.numel(),
        embed_dim=config.embed_dim,
    )


def on_paper(sizes: Sizes, world: int, batch: int, reduce: str) -> Sent:
    """
    Args:
        batch: samples a GPU.
        reduce: "allreduce": every rank receives the whole sum; "scatter": its own share alone, at half the traffic.
    """
    ring = (world - 1) / world  # a reduce-scatter or all-gather of N bytes sends this share of them from each rank
    passes = {"allreduce": 2, "scatter": 1}[reduce]
    return Sent(
        gradients=passes * ring * 4 * sizes.trained,
        parameters=ring * 4 * sizes.trained,
        features=ring * world * 2 * batch * sizes.embed_dim * 4,
    )


def counted(preset: str, batch: int) -> dict[tuple[str, int, int], Sent]:
    """By way of reducing, stage and world. Raises as collectives.count does."""
    (configuration,) = collectives.configurations([CONFIGURATION])
    keys = [(reduce, stage, world) for reduce in REDUCE for stage in (1, 2) for world in WORLDS]
    cases = [collectives.Case(configuration, stage, world, (0,), reduce == "scatter") for reduce, stage, world in keys]
    found = {}
    for key, row in zip(keys, collectives.count(cases, preset, batch), strict=True):
        link = {name: row["purposes"][name]["over link"] for name in SENT}
        found[key] = Sent(**link, collectives=row["collectives a step"])
    return found


def calculate(
    sizes: Sizes, world: int, stage: int, batch: int, reduce: str, step_ms: float | None, sent: Sent | None = None
) -> Row:
    """
    Args:
        batch, reduce: as of `on_paper`.
        step_ms: of one GPU without communication, measured; None: not measured.
        sent: as counted; None: as on paper.
    """
    sent = sent or on_paper(sizes, world, batch, reduce)
    link = LINKS["NVLink"] if world <= NODE else LINKS["InfiniBand of a node"]
    reduce_ms = 1e3 * sent.gradients / link
    rest_ms = 1e3 * (sent.parameters + sent.features) / link
    held = 4 * sizes.trained / GIB
    return Row(
        world=world,
        stage=stage,
        collectives=sent.collectives,
        reduce_bytes=sent.gradients,
        gather_bytes=sent.parameters,
        feature_bytes=sent.features,
        parameters_gib=held,
        teacher_gib=4 * sizes.teacher / GIB,
        gradients_gib=held / world if stage == 2 else held,
        optimizer_gib=3 * held / world,  # fp32 masters and two moments
        queue_gib=4 * sizes.queue / GIB,
        communication_ms=reduce_ms + rest_ms,
        compute_ms=step_ms,
        efficiency_none_hidden=step_ms and step_ms / (step_ms + reduce_ms + rest_ms),
        efficiency_reduce_hidden=step_ms and step_ms / (max(step_ms, reduce_ms) + rest_ms),
    )


def report(preset: str, batch: int, step_ms: float | None, source: str) -> dict:
    """All rows, with what they were made of."""
    config = workload.preset(preset)
    sizes, sent = sizes_of(config), counted(preset, batch)
    work = flops.per_sample(config, workload.lengths_of("mean14", 8))["ours"]
    rows: dict[str, list[dict]] = {reduce: [] for reduce in REDUCE}
    differences = []
    for (reduce, stage, world), found in sent.items():
        row = calculate(sizes, world, stage, batch, reduce, step_ms, found)
        paper = on_paper(sizes, world, batch, reduce)
        rows[reduce].append({**asdict(row), "state_gib": row.state_gib, "on paper": asdict(paper)})
        differences += [f"{reduce}, ZeRO-{stage}, {world} GPUs: {each}" for each in found.differences(paper)]
    return {
        "environment": measure.environment(torch.device("cpu")),
        "counted": f"bytes and collectives, by benchmarks.collectives on {CONFIGURATION}",
        "calculated": "everything else but compute_ms",
        "bytes off paper by more than 0.1 %": differences,
        "step time": source if step_ms else "not measured; no efficiency is given",
        "lower bound of compute ms": 1e3 * batch * work / peak_flops_by_name(CHIP),
        "preset": preset,
        "samples a GPU": batch,
        "sizes": asdict(sizes),
        "links, bytes/s": LINKS,
        "rows": rows,
    }


def measured_step(path: Path, batch: int) -> tuple[float, str]:
    """(milliseconds, where from) of ours in a result of benchmarks.step with this batch.

    Raises:
        ValueError: the file holds no such measurement, or it is not an A100's.
    """
    found = json.loads(path.read_text())
    try:
        device = found["environment"]["device"]
        ours = [row for row in found["steps"] if row["contender"] == "ours bf16" and "median" in row]
        measured = [(row["median"], row["captions"]) for row in ours if row.get("batch") == batch]
    except (KeyError, TypeError):
        raise ValueError(f"{path.name} is no result of benchmarks.step") from None
    if CHIP not in device:
        raise ValueError(f"{path.name} was measured on {device}, these are {CHIP}s")
    for milliseconds, captions in measured:
        return milliseconds, f"measured: {path.name}, {device}, captions {captions}"
    raise ValueError(f"{path.name} holds no step of ours at {batch} samples")


def plot(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for reduce, rows in found["rows"].items():
        mine = [row for row in rows if row["stage"] == 2]
        times = [row["communication_ms"] for row in mine]
        left.plot([row["world"] for row in mine], times, marker="o", label=f"communication, gradients by {reduce}")
    bound = found["lower bound of compute ms"]
    left.axhline(bound, color="grey", linestyle="--", label="compute, lower bound")
    if found["rows"]["scatter"][0]["compute_ms"]:
        left.axhline(found["rows"]["scatter"][0]["compute_ms"], color="black", label="compute, measured on one GPU")
    left.set(xscale="log", xlabel="GPUs", ylabel="ms a step", ylim=(0, None), title="Communication, none hidden")
    for stage in (1, 2):
        mine = [row for row in found["rows"]["scatter"] if row["stage"] == stage]
        right.plot(
            [row["world"] for row in mine], [row["state_gib"] for row in mine], marker="o", label=f"ZeRO-{stage}"
        )
    right.set(xscale="log", xlabel="GPUs", ylabel="GiB a GPU", ylim=(0, None), title="Model state, calculated")
    for axes in (left, right):
        axes.set_xticks(WORLDS, WORLDS)
        axes.minorticks_off()
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def render(found: dict) -> str:
    off = "; ".join(found["bytes off paper by more than 0.1 %"]) or "no row"
    bound = found["lower bound of compute ms"]
    lines = [
        f"For {found['preset']}, {found['samples a GPU']} samples a GPU, {CHIP}s in nodes of {NODE}. Counted: "
        f"{found['counted']}; they differ from those on paper by more than 0.1 % in {off}. Calculated: all else, ms "
        f"from the data sheet's links. Step time of one GPU: {found['step time']}. Compute takes at least "
        f"{bound:.1f} ms (counted FLOPs at the data sheet's peak)."
    ]
    for reduce, rows in found["rows"].items():
        shown = [
            {
                "GPUs": row["world"],
                "ZeRO": row["stage"],
                "collectives": row["collectives"],
                "gradients MB": row["reduce_bytes"] / 1e6,
                "parameters MB": row["gather_bytes"] / 1e6,
                "features MB": row["feature_bytes"] / 1e6,
                "ms": row["communication_ms"],
                "state GiB": row["state_gib"],
                "efficiency, none hidden": row["efficiency_none_hidden"],
                "efficiency, gradients hidden": row["efficiency_reduce_hidden"],
            }
            for row in rows
        ]
        lines += ["", f"Gradients by {reduce}; sent by each rank in a step:", "", measure.table(shown, list(shown[0]))]
    return "\n".join(lines)


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=measure.folder, help="folder for scaling.json, scaling.md and scaling.png")
    parser.add_argument("--preset", default="base", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=64, help="samples a GPU")
    parser.add_argument("--step-ms", type=float, help="measured step of one GPU without communication")
    parser.add_argument("--step-json", type=Path, help="result of benchmarks.step on that GPU")
    args = parser.parse_args(argv)
    if args.batch < 8 or args.batch % 8:
        parser.error(f"--batch is {args.batch}, and captions come in whole eights: give 8, 16, ...")
    if args.step_ms is not None and args.step_ms <= 0:
        parser.error(f"--step-ms must be more than 0, got {args.step_ms:g}")
    step_ms, source = args.step_ms, "measured, given by --step-ms"
    if args.step_json:
        try:
            step_ms, source = measured_step(args.step_json, args.batch)
        except (OSError, ValueError) as error:
            parser.error(f"--step-json: {error}")
    try:
        found = report(args.preset, args.batch, step_ms, source)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    measure.tell(found, render(found), args.json, args.out, "scaling", plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
