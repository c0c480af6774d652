"""Has the step become slower, heavier or (unexplained) lighter since its baseline?

    python -m benchmarks.regress [--baseline benchmarks/baselines/<device>.json] [--record] [--counts-only]
                                 [--instructions] [--json]
    python -m benchmarks.regress --self-test        # does the check itself work here?
    python -m benchmarks.regress --history          # table and plot of benchmarks/results/*.json

Counts come first: they do not wobble, and each has a small margin in both directions. Then our step is timed in turns
with the reference implementation, and fails only if the whole confidence interval of the ratio lies beyond the limit.
A baseline belongs to a device and to versions of torch and DeepSpeed; anything else is "no baseline", which is not a
pass. `--record` writes the new baseline, to be committed with the change that explains it.

Exit status: 0 passed; 1 changed; 2 the check itself does not work here (--self-test); 3 no baseline, or nothing can be
counted here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError

from benchmarks import PRESETS, contenders, counts, history, measure, workload
from benchmarks.comparison import Finding, Interval, judge_counts, judge_time, paired_ratio, self_test
from benchmarks.step import with_cpu_time

PASSED, CHANGED, BROKEN, NO_BASELINE = 0, 1, 2, 3
FOLDER = Path(__file__).parent / "baselines"
VERSIONS = ("torch", "deepspeed")
LIMIT = {"cpu": 0.10, "cuda": 0.03}  # 3 % needs a GPU with locked clocks; a CPU is mostly shared
TIMED = {"cpu": ("small", 4, "ours fp32"), "cuda": ("base", 64, "ours bf16")}  # preset, batch, contender


def device_key(device: torch.device) -> str:
    """The file's name: the GPU's model; all CPUs share one, since counts are the same on them."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "_", measure.device_name(device).lower()).strip("_")


def conditions(device: torch.device, preset: str) -> dict:
    """What a baseline is for, and where it was measured."""
    environment = measure.environment(device)
    versions = {name: (environment["packages"].get(name) or "none").split("+")[0] for name in VERSIONS}
    return {"device": device_key(device), "versions": versions, "preset": preset, "environment": environment}


def measured(device: torch.device, preset: str, timed: bool, instructions: bool, seconds: float) -> dict:
    """The rest of what a baseline holds."""
    found = {"counts": counts.collect(device, preset, instructions)}
    return found | {"times": time_ratios(device, seconds) if timed else {}}


def time_ratios(device: torch.device, seconds: float) -> dict[str, dict]:
    """Our step's time over the reference's; on a CPU processor time, which a busy neighbour does not change."""
    preset, batch, name = TIMED[device.type]
    config = workload.preset(preset)
    data = workload.captions_batch(config, "mean14", batch)
    steps = {rival: contenders.build(rival, config, device, data) for rival in (name, "reference")}
    samples = in_turns(steps, device, seconds, least=12)
    ratio = paired_ratio(samples[name], samples["reference"])
    return {f"{name} of the reference, {preset}, batch {batch}": dataclasses.asdict(ratio)}


def in_turns(calls: dict, device: torch.device, seconds: float, least: int) -> dict[str, list[float]]:
    """Milliseconds of every call, interleaved: of the clock on a GPU, of the processor on a CPU."""
    warmup = 2
    used: dict[str, list[float]] = {name: [] for name in calls}
    timed = {name: with_cpu_time(call, used[name]) for name, call in calls.items()}
    samples = measure.interleaved(timed, device, seconds, least=least, warmup=warmup)
    return samples if device.type == "cuda" else {name: times[warmup:] for name, times in used.items()}


class NoBaseline(Exception):
    """There is nothing that may be compared with; says why."""


class Median(BaseModel, extra="allow"):
    median: float


class Environment(BaseModel, extra="allow"):
    python: str
    device: str


class Baseline(BaseModel):
    """What `--record` writes."""

    device: str
    versions: dict[str, str]
    preset: str
    environment: Environment
    counts: dict[str, float | None]
    times: dict[str, Median]


def read_baseline(path: Path) -> dict:
    """
    Raises:
        NoBaseline: there is none, or the file holds something else.
    """
    try:
        baseline = Baseline.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise NoBaseline(f"{path.name} does not exist; --record on this device writes it") from None
    except OSError as error:
        raise NoBaseline(f"{path.name} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise NoBaseline(f"{path.name} is none: {where}: {first['msg']}; --record writes it anew") from None
    return baseline.model_dump()


def why_no_baseline(now: dict, baseline: dict) -> str | None:
    """None if the two may be compared."""
    for key in ("device", "versions", "preset"):
        if now[key] != baseline.get(key):
            return f"its {key} is {baseline.get(key)}, here it is {now[key]}"
    return None


def compare(now: dict, baseline: dict, kind: str) -> tuple[list[Finding], list[str]]:
    """(findings, what could not be compared and why)."""
    left = {n: "not measured" for n, value in now["counts"].items() if value is None and n.startswith("instructions")}
    pythons = [".".join(side["environment"]["python"].split(".")[:2]) for side in (now, baseline)]
    if len(set(pythons)) > 1:
        other = f"counted under Python {pythons[1]}, this is {pythons[0]}"
        left |= {name: other for name in now["counts"] if name.startswith(counts.PYTHON_CALLS)}
    here, there = ({n: v for n, v in side["counts"].items() if n not in left} for side in (now, baseline))
    found, left = judge_counts(here, there, counts.margin_of), [f"{n}: {why}" for n, why in sorted(left.items())]
    same_chip = now["environment"]["device"] == baseline["environment"]["device"]
    for name, recorded in baseline["times"].items():
        if name not in now["times"]:
            left.append(f"{name}: not measured")
        elif not same_chip:
            left.append(f"{name}: no baseline for {now['environment']['device']}")
        else:
            found.append(judge_time(name, Interval(**now["times"][name]), recorded["median"], LIMIT[kind]))
    return found, left


def verdict(findings: list[Finding], left: list[str]) -> int:
    if any(finding.fails for finding in findings):
        return CHANGED
    return NO_BASELINE if any("no baseline" in reason for reason in left) else PASSED


def render(findings: list[Finding]) -> str:
    rows = [
        {"what": f.name, "now": f.now, "baseline": f.baseline, "may differ by": f"{100 * f.margin:g} %", "is": f.kind}
        for f in sorted(findings, key=lambda f: (not f.fails, f.name))
    ]
    return measure.table(rows, ["what", "now", "baseline", "may differ by", "is"])


def busy_step(device: torch.device, seconds: float):
    """`measure` of comparison.self_test on a real clock: a step that does a share more of the same work."""
    a = torch.randn(160, 160, device=device)

    def work(times: int) -> None:
        for _ in range(times):
            a @ a

    def timed(slowdown: float, trial: int) -> tuple[list[float], list[float]]:
        calls = {"now": lambda: work(round(50 * (1 + slowdown))), "before": lambda: work(50)}
        samples = in_turns(calls, device, seconds, least=30)
        return samples["now"], samples["before"]

    return timed


def check(args, device: torch.device) -> int:
    path = args.baseline or FOLDER / f"{device_key(device)}.json"
    now = conditions(device, args.preset)
    try:
        baseline = None if args.record else read_baseline(path)
        if baseline and (reason := why_no_baseline(now, baseline)):
            raise NoBaseline(f"{path.name}: {reason}")
        now |= measured(device, args.preset, not args.counts_only, args.instructions, args.seconds)
    except NoBaseline as error:
        print(f"no baseline: {error}", file=sys.stderr)
        return NO_BASELINE
    except counts.CountingError as error:
        print(f"nothing to compare with a baseline: {error}", file=sys.stderr)
        return NO_BASELINE
    if args.results:
        history.add(args.results, now)
    if baseline is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1) + "\n")
        print(f"recorded {path.name}: commit it together with what explains it")
        return PASSED
    findings, left = compare(now, baseline, device.type)
    status = verdict(findings, left)
    if args.json:
        found = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"status": status, "findings": found, "not compared": left, "now": now}, indent=1))
    else:
        word = {PASSED: "passed", CHANGED: "CHANGED", NO_BASELINE: "counts passed; NO BASELINE for the rest"}[status]
        print("\n".join([render(findings), "", *(f"not compared: {line}" for line in left), word]))
    return status


def main(argv=None) -> int:
    """The command line in this file's head."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--record", action="store_true", help="write the baseline in place of comparing")
    parser.add_argument("--device", type=measure.device)
    parser.add_argument("--preset", default="base", choices=PRESETS, help="model whose FLOPs are counted")
    parser.add_argument("--counts-only", action="store_true", help="no times: for machines that are shared")
    parser.add_argument("--instructions", action="store_true", help="count instructions under valgrind too (minutes)")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the timed comparison")
    parser.add_argument("--results", type=measure.folder, help="folder that keeps this measurement for the history")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--history", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    device = measure.pick_device(args.device)
    if args.history:
        print(history.render(args.results or history.FOLDER))
        return PASSED
    if args.self_test:
        found = self_test(busy_step(device, seconds=0.1), LIMIT[device.type])
        print(json.dumps(found, indent=1))
        return PASSED if found["ok"] else BROKEN
    return check(args, device)


if __name__ == "__main__":
    raise SystemExit(main())
