"""What a training step costs its host: processor time of one core without the step's arithmetic, and what it counts.

    python -m benchmarks.host [--preset base] [--stages 0 1 2] [--counts] [--against FOLDER] [--seconds 12]
                              [--deepspeed zero2_a100_80gb] [--world 1] [--json] [--out DIR]

The real step of pre-training under DeepSpeed, bf16 autocast as on a GPU, at the preset's depth; but heads hold 4
numbers, attention is one autograd function as flash-attn's is, and attention and ITC compute nothing. What is left is
Python, autograd, autocast, the dispatcher, and narrow kernels of the CPU where a GPU's host launches its own (matrix
products: a fifth of the step on an AMD EPYC). Not in it: launching CUDA kernels, Triton's launcher, flash-attn's own
Python, NCCL, the second CUDA stream of overlap_comm, and what the loop does beside the step (loader, log, checkpoints,
watching for bad steps).

Each stage of ZeRO (0: none) and each checkout has a process of its own; they are timed in turns, A B B A, each by the
second of two steps. Counts (calls of Python functions, operators dispatched) come from steps of their own and do not
wobble; they do depend on the minor versions of Python, torch and DeepSpeed. --against pairs this checkout with another
one: this one's benchmarks and FOLDER's albef_ds. Ratios are this one's time by the other's: below 1 this one is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from benchmarks import PRESETS, measure, other_checkout
from benchmarks.collectives import available
from benchmarks.comparison import LEAST_PAIRS, paired_ratio

COUNTS = ("python calls", "python calls in deepspeed", "operators", "operators without views")
# DeepSpeed and PyTorch must find no GPU; hashes of strings decide in which order a set is gone through.
SURROUNDINGS = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


class HostError(RuntimeError):
    """A step could not be measured; names the checkout and the stage, and says how its process ended."""


class Worker:
    """A process that holds one engine and answers questions (benchmarks/host_step.py). A context manager."""

    def __init__(self, folder: Path, stage: int, args: argparse.Namespace):
        self.name, self.log = f"{folder}, stage {stage}", tempfile.TemporaryFile()
        answers, descriptor = os.pipe()
        command = [sys.executable, "-m", "benchmarks.other_checkout", folder, "benchmarks.host_step"]
        command += [folder, args.preset, args.deepspeed, stage, args.world, descriptor]
        self.process = subprocess.Popen(
            [*map(str, command)],
            cwd=measure.ROOT,
            env={**os.environ, **SURROUNDINGS},
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[descriptor],
            text=True,
        )
        os.close(descriptor)
        self.answers = os.fdopen(answers)

    def ask(self, question: str) -> dict:
        """Waits for the answer; for the first one some seconds. Raises HostError where the process ends instead."""
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
            answer = self.answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            self.log.seek(0)
            last = "\n  ".join(self.log.read().decode(errors="replace").strip().splitlines()[-3:])
            raise HostError(f"{self.name}: the step cannot be measured, its process ended with {code}:\n  {last}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()  # it has nothing to save
        self.process.wait()
        with suppress(BrokenPipeError):  # what a question left behind, to a process that had ended
            self.process.stdin.close()
        self.answers.close()
        self.log.close()


def collect(folders: list[Path], args: argparse.Namespace) -> list[dict[int, dict]]:
    """What each checkout counts and takes at each stage: {stage: counts, "samples": {phase: ms of each round}}."""
    with ExitStack() as stack:
        workers, found = {}, [{} for _ in folders]
        for stage in args.stages:
            for number, folder in reversed([*enumerate(folders)]):  # the other checkout, which may not fit, first
                worker = stack.enter_context(Worker(folder, stage, args))
                found[number][stage] = worker.ask("counts")  # before the next one starts: cores may be few
                workers[number, stage] = worker
        if args.counts:
            return found
        questions = {key: lambda worker=worker: worker.ask("step") for key, worker in workers.items()}
        device = torch.device("cpu")
        rounds = measure.interleaved(questions, device, args.seconds, LEAST_PAIRS, clock=lambda call: call())
    for (number, stage), steps in rounds.items():
        samples = {phase: [step[phase] for step in steps] for phase in steps[0]}
        found[number][stage]["samples"] = {**samples, "all": [sum(step.values()) for step in steps]}
    return found


def report(found: list[dict[int, dict]], folders: list[Path], settings: dict) -> dict:
    """The result as it is printed and kept."""
    here = found[0]
    first = next(iter(here.values()))
    result = {
        "environment": measure.environment(torch.device("cpu")) | {"threads": 1},  # as the processes had it
        "settings": settings,
        "imported from": [os.path.relpath(place, measure.ROOT) for place in first["imported from"]],
        "trained tensors": first["trained tensors"],
        "stages": {str(stage): numbers(case) for stage, case in here.items()},
    }
    if len(found) > 1:
        result["against"] = against(here, found[1], folders[1])
    return result


def numbers(case: dict) -> dict:
    """One stage of one checkout."""
    times = {}
    if samples := case.get("samples"):
        times["ms"] = {phase: statistics.median(each) for phase, each in samples.items()}
        times["least ms"] = {phase: min(each) for phase, each in samples.items()}
        times["rounds"] = len(samples["all"])
    return {
        **times,
        **{name: case[name] for name in COUNTS},
        "python calls by package": case["python calls by package"],
    }


def against(here: dict[int, dict], there: dict[int, dict], folder: Path) -> dict:
    """The other checkout's numbers, the ratios of times and the differences of counts, here to there."""
    first = next(iter(there.values()))
    found = {
        "folder": str(folder),
        "imported from": first["imported from"],
        "trained tensors": first["trained tensors"],
    }
    found["stages"] = {str(stage): numbers(case) for stage, case in there.items()}
    found["more here"] = {
        str(stage): {name: here[stage][name] - case[name] for name in COUNTS} for stage, case in there.items()
    }
    if "samples" in first:
        found["time here / there"] = {
            str(stage): {
                phase: vars(paired_ratio(here[stage]["samples"][phase], times))
                for phase, times in case["samples"].items()
            }
            for stage, case in there.items()
        }
    return found


def markdown(result: dict) -> str:
    """Two tables at most: milliseconds (medians) and counts; and the comparison."""
    around, other = result["environment"], result.get("against")
    versions = ", ".join(f"{name} {around['packages'].get(name)}" for name in ("torch", "deepspeed"))
    lines = [f"{around['device']}, one core; Python {around['python']}, {versions}; commit {around['commit']}"]
    lines.append(", ".join(f"{name} {value}" for name, value in result["settings"].items()))
    lines.append(f"{result['trained tensors']} trained tensors; imported from {', '.join(result['imported from'])}")
    rows = [{"stage": stage, **case.get("ms", {}), **case} for stage, case in result["stages"].items()]
    if other:
        lines.append(f"against: {other['trained tensors']} trained tensors; from {', '.join(other['imported from'])}")
        theirs = [
            {"stage": f"{stage}, against", **case.get("ms", {}), **case} for stage, case in other["stages"].items()
        ]
        rows = [row for pair in zip(rows, theirs, strict=True) for row in pair]
    if "ms" in rows[0]:
        lines += [
            "",
            "Milliseconds of processor time a step, medians:",
            "",
            measure.table(rows, ["stage", *rows[0]["ms"]]),
        ]
    lines += ["", measure.table(rows, ["stage", *COUNTS])]
    if other:
        lines += ["", "This checkout's time by the other's (95 % interval), and what it counts more:", ""]
        lines.append(measure.table(*compared(other)))
    return "\n".join(lines)


def compared(other: dict) -> tuple[list[dict], list[str]]:
    """Rows and columns of the comparison."""
    rows = []
    for stage, more in other["more here"].items():
        ratios = other.get("time here / there", {}).get(stage, {})
        shown = {phase: f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for phase, r in ratios.items()}
        rows.append({"stage": stage, **shown, **{name: f"{number:+d}" for name, number in more.items()}})
    return rows, list(rows[0])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", choices=PRESETS, help="whose depth")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2], choices=(0, 1, 2))
    parser.add_argument("--counts", action="store_true", help="count, and time nothing")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this project")
    parser.add_argument("--seconds", type=float, default=12.0, help=f"of the timing; at least {LEAST_PAIRS} rounds")
    parser.add_argument("--deepspeed", default="zero2_a100_80gb", help="name of a file in ds_configs")
    parser.add_argument("--world", type=int, default=1, help="ranks, of which this is one and the others are made up")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--out", type=measure.folder, help="a folder for host.json and host.md")
    args = parser.parse_args(argv)
    if args.against and (lacking := other_checkout.missing(args.against)):
        parser.error(f"--against {args.against}: no checkout of this project ({lacking}); give its top folder")
    if args.deepspeed not in available():
        parser.error(f"--deepspeed {args.deepspeed}: no such file in ds_configs; choose from {', '.join(available())}")
    if args.world < 1:
        parser.error(f"--world {args.world}: at least one rank is needed")
    args.stages = sorted(set(args.stages))
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line in this file's head."""
    args = arguments(argv)
    folders = [measure.ROOT, *([args.against.resolve()] if args.against else [])]
    try:
        settings = {"preset": args.preset, "deepspeed": args.deepspeed, "world": args.world}
        result = report(collect(folders, args), folders, settings)
    except HostError as error:
        print(error, file=sys.stderr)
        return 2
    measure.tell(result, markdown(result), args.json, args.out, "host")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
