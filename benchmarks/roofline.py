"""What a training step would launch on a GPU, and the least time that this takes: counted and calculated on any CPU.

    python -m benchmarks.roofline [--json] [--out DIR] [--contenders ours modernised reference] [--task pretraining]
                                  [--preset base] [--batch 64] [--captions histogram] [--backend flash] [--pixels N]
                                  [--dropout 0.1]

The steps of benchmarks.contenders run on tensors that claim to lie on an H100 and have no values (benchmarks.fake_gpu);
operators, launches, FLOPs and bytes are counted (benchmarks.launches), and each group of operators takes the larger of
its FLOPs over a card's rate and its bytes over the card's bandwidth (benchmarks.chips). Launching, waiting and small
kernels take time that is in no figure here: a real step takes longer.

Ours is bf16 under autocast, fused AdamW, without DeepSpeed; its fusion pass has room for the longest negative texts,
and its FLOPs have that too, about a hundredth more than benchmarks.flops counts on a CPU. The modernised reference is
not compiled, and both references take the first candidate as every negative in place of 2 B draws with as many waits,
which are left out; the plain one's attention is among the products and softmaxes. All cards get an H100's kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import CAPTIONS, PRESETS, fake_gpu

if TYPE_CHECKING:
    from albef_ds.config import ModelConfig
    from benchmarks.contenders import Contender, Place
    from benchmarks.launches import LaunchCount, Work

CONTENDERS = {"ours": "ours bf16", "modernised": "modernised", "reference": "reference"}
TASKS = ("pretraining", "retrieval", "vqa", "entailment", "nlvr", "text_assignment", "grounding")
BACKENDS = ("flash", "varlen", "efficient", "sdpa", "eager")
CAPABILITY = (9, 0)  # whose kernels scaled_dot_product_attention chooses, and ours are cut for


def count(name: str, task: str, config: ModelConfig, lengths: list[int]) -> LaunchCount:
    """What the second step of a contender launches.

    Args:
        name: one of CONTENDERS.
        lengths: tokens of each text of the batch.

    Raises:
        ValueError: the reference, and a task that it does not know.
    """
    from benchmarks import contenders, workload
    from benchmarks.counting import Replay
    from benchmarks.launches import LaunchCount

    if name != "ours" and config.queue_size % len(lengths):
        raise ValueError(f"{name}: a queue of {config.queue_size} takes batches that divide it, not {len(lengths)}")
    answers = [] if name == "ours" else _answers(name, config, lengths)
    batch = workload.task_batch(task, config, lengths)
    contender = contenders.build(CONTENDERS[name], config, on_the_fake_gpu(), batch, task=task)
    _without_draws(name, contender)
    with fake_gpu.install():
        with Replay(answers):
            contender()
        with Replay(answers), LaunchCount() as counted:
            contender.step(counted.phase)
    return counted


def _answers(name: str, config: ModelConfig, lengths: list[int]) -> list:
    """The numbers that a reference asks its tensors for, from a real step of a narrow model on the same texts."""
    import torch

    from benchmarks import contenders, flops, workload
    from benchmarks.counting import Recording

    small = flops.narrowed(config)
    vision = small.vision.model_copy(update={"image_size": small.vision.patch_size})
    small = small.model_copy(update={"vision": vision, "queue_size": len(lengths)})
    batch = workload.task_batch("pretraining", small, lengths)
    contender = contenders.build(CONTENDERS[name], small, torch.device("cpu"), batch)
    _without_draws(name, contender)
    with Recording() as recording:
        contender()
    return recording.answers


def _without_draws(name: str, contender: Contender) -> None:
    if name != "ours":
        contender.model.choose = lambda weights: 0


def on_the_fake_gpu() -> Place:
    """Where contenders have tensors without values; to be called after fake_gpu.install()."""
    import torch

    from benchmarks.contenders import Place

    class FakeGPU(Place):
        def model(self, make):
            with torch.device("meta"):  # values would only cost time
                made = make()
            return fake_gpu.to_gpu(made)

        def batch(self, batch):
            return fake_gpu.move(batch)

    return FakeGPU(torch.device("cuda"))


def numbers(work: Work) -> dict:
    """One line of the report, under the names that every report has."""
    from benchmarks.chips import CHIPS

    ms = {name: chip.milliseconds(work.bf16_flops, work.bytes) for name, chip in CHIPS.items()}
    return {"launches": work.launches, "gb": work.bytes / 1e9, "tflop": work.flops / 1e12, "ms": ms}


def summed(counted: LaunchCount) -> dict:
    """A contender's step: sums, and the groups whose calculated times they add up."""
    groups = {name: numbers(work) for name, work in counted.groups().items()}
    whole = counted.total()
    found = numbers(whole) | {"operators": whole.operators}
    found["ms"] = {chip: sum(group["ms"][chip] for group in groups.values()) for chip in found["ms"]}
    found["groups"] = groups
    found["phases"] = {name: numbers(work) for name, work in counted.phases().items()}
    found["own kernels"] = {
        name: {
            "launches": launches,
            "mb": counted.kernels.least[name] / 1e6,
            "mb asked of the caches": counted.kernels.asked[name] / 1e6,
            "gflop": counted.kernels.flops[name] / 1e9,
        }
        for name, launches in counted.kernels.launches.items()
    }
    return found


def report(args: argparse.Namespace) -> dict:
    """All that the command line asks for, by contender, and the conditions."""
    import torch

    from benchmarks import chips, measure, workload

    config = workload.preset(args.preset, args.dropout).model_copy(update={"attention": args.backend})
    if args.pixels is not None:
        if args.pixels < 1 or args.pixels % config.vision.patch_size:
            raise ValueError(f"--pixels {args.pixels}: give a multiple of the patches' {config.vision.patch_size}")
        vision = config.vision.model_copy(update={"image_size": args.pixels})
        config = config.model_copy(update={"vision": vision})
    lengths = workload.lengths_of(args.captions, args.batch)
    found = {name: summed(count(name, args.task, config, lengths)) for name in args.contenders}
    found["conditions"] = {
        **{name: getattr(args, name) for name in ("task", "preset", "batch", "captions", "backend", "dropout")},
        "pixels": config.vision.image_size,
        "tokens": sum(lengths),
        "queue": config.queue_size,
        "capability": CAPABILITY,
        "rates": {name: vars(chip) for name, chip in chips.CHIPS.items()},
        "packages": {"torch": torch.__version__, "triton": measure.package_version("triton")},
        "commit": measure.commit(),
    }
    return found


def render(found: dict) -> str:
    from benchmarks import measure
    from benchmarks.chips import CHIPS

    conditions = found["conditions"]
    lines = [
        "{task}, {preset}, {pixels} pixels, {batch} samples, {captions} captions, {backend}. Counted; ms are "
        "calculated, each group at its limit.".format(**conditions)
    ]
    for name in CONTENDERS:
        if name not in found:
            continue
        rows = [
            {
                "group": group,
                "launches": row["launches"],
                "GFLOP": f"{1e3 * row['tflop']:.0f}",
                "GB": f"{row['gb']:.2f}",
                **{f"ms {chip}": f"{row['ms'][chip]:.2f}" for chip in CHIPS},
            }
            for group, row in [*found[name]["groups"].items(), ("all", found[name])]
        ]
        lines += ["", f"## {name}", "", measure.table(rows, list(rows[0]))]
        if kernels := found[name]["own kernels"]:
            rows = [{"kernel": kernel, **row} for kernel, row in kernels.items()]
            lines += ["", measure.table(rows, list(rows[0]))]
    return "\n".join(lines)


def plot(found: dict, path: Path) -> None:
    """A bar for each group and card, a panel for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.chips import CHIPS

    names = [name for name in CONTENDERS if name in found]
    groups = list(dict.fromkeys(group for name in names for group in found[name]["groups"]))
    size = {"figsize": (3 + 4 * len(names), 6), "layout": "constrained"}
    figure, panels = plt.subplots(1, len(names), sharex=True, sharey=True, squeeze=False, **size)
    for axes, name in zip(panels[0], names, strict=True):
        shown = [
            (at, found[name]["groups"][group]) for at, group in enumerate(groups) if group in found[name]["groups"]
        ]
        for place, chip in enumerate(CHIPS):
            heights = [at + (place - 1.5) * 0.2 for at, _ in shown]
            axes.barh(heights, [row["ms"][chip] for _, row in shown], height=0.2, label=chip)
        totals = "\n".join(f"{chip} {ms:.1f} ms" for chip, ms in found[name]["ms"].items())
        axes.text(0.95, 0.3, f"in all\n{totals}", transform=axes.transAxes, ha="right", va="top")
        axes.set(xlabel="ms a step, calculated", title=name)
    panels[0][0].set_yticks(range(len(groups)), groups)
    panels[0][0].invert_yaxis()
    panels[0][0].legend(loc="center right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for roofline.json, roofline.md and roofline.png")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all that know the task")
    parser.add_argument("--task", default="pretraining", choices=TASKS)
    parser.add_argument("--preset", default="base", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--captions", default="histogram", choices=CAPTIONS)
    parser.add_argument("--backend", default="flash", choices=BACKENDS, help="of ours")
    parser.add_argument("--pixels", type=int, help="default: the preset's")
    parser.add_argument("--dropout", type=float, default=0.1, help="of texts")
    args = parser.parse_args(argv)
    args.contenders = args.contenders or (list(CONTENDERS) if args.task == "pretraining" else ["ours"])
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must be from 0 to 1, 1 excluded, got {args.dropout}")
    os.environ["TRITON_INTERPRET"] = "1"  # own kernels are counted in the interpreter
    try:
        fake_gpu.install(CAPABILITY, flash="ours" in args.contenders and args.backend == "flash")
        from benchmarks import measure  # which brings torch, and so comes after the fake GPU

        args.out = args.out and measure.folder(args.out)
        found = report(args)
    except (RuntimeError, ValueError, argparse.ArgumentTypeError) as error:
        print(f"benchmarks.roofline: {error}", file=sys.stderr)
        return 2
    measure.tell(found, render(found), args.json, args.out, "roofline", plot)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # at the interpreter's own end fake storages that are still referred to make a great noise
