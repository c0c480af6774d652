"""The numbers of a step that do not wobble, for benchmarks.regress: what is executed, asked for and sent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from benchmarks import contenders, flops, measure, workload
from benchmarks.counting import OperatorCount

BATCH = 8
LONGEST = 300  # seconds of a process that counts
# Shares by which a count may differ; names without an entry may not differ at all.
MARGINS = {
    "FLOP": 0.002,
    "bytes": 0.001,
    "operators under DeepSpeed": 0.001,
    "operators": 0.02,
    "kernel launches": 0.02,
    "instructions": 0.025,
    "Python calls": 0.001,
}
PYTHON_CALLS = "Python calls"  # of one minor version of Python alone

INSTRUCTIONS = {
    "masking a caption": (
        "mask_ids(ids, rng, probability=0.15, vocab_size=30522, mask_id=103, cls_id=101, pad_id=0)",
        "import numpy as np; from albef_ds.data.masking import mask_ids; "
        "rng = np.random.default_rng(0); ids = list(range(1000, 1020))",
    ),
    "packing a batch": (
        "PackedText.from_lists(texts)",
        "from albef_ds.data.batch import PackedText; texts = [list(range(n)) for n in (9, 10, 11, 12, 13, 15, 17, 25)]",
    ),
}


class CountingError(RuntimeError):
    """Something cannot be counted on this machine; says why."""


def margin_of(name: str) -> float:
    return next((margin for part, margin in MARGINS.items() if part in name), 0.0)


def collect(device: torch.device, preset: str, instructions: bool = False) -> dict[str, float | None]:
    """All counts; None is "not measured here".

    Those of our step on `device` are of the tiny model, all others of `preset`. What is the same on every machine is
    counted where no GPU is, once.

    Raises:
        CountingError: this machine lacks what a count needs.
    """
    with ThreadPoolExecutor(1) as beside, one_thread():
        apart = beside.submit(counted_apart, preset) if device.type == "cpu" else None
        found = {**flop_counts(preset), **step_counts(device)}
        found |= apart.result() if apart else {}
    for name, (statement, setup) in INSTRUCTIONS.items():
        found[f"instructions: {name}"] = instruction_count(statement, setup) if instructions else None
    return found


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Leaves the other cores to processes that count beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def flop_counts(preset: str) -> dict[str, float]:
    config, found = workload.preset(preset), {}
    for captions in ("mean14", "full"):
        case = flops.per_sample(config, workload.lengths_of(captions, BATCH))
        found[f"FLOP a sample, {preset}, {captions}"] = case["ours"]
        found[f"FLOP of the reference's, {preset}, {captions}"] = case["ratio"]
    return found


def step_counts(device: torch.device) -> dict[str, float | None]:
    """Of one step of our tiny model after a first one: operators, host syncs, graph breaks, launches."""
    config = workload.preset("tiny")
    name = "ours bf16" if device.type == "cuda" else "ours fp32"
    torch._dynamo.utils.counters.clear()
    step = contenders.build(name, config, device, workload.captions_batch(config, "mean14", BATCH))
    step()
    operators, asked = by_phase(step)
    return {
        **{f"operators a step, {phase}": number for phase, number in operators.items()},
        # Without the optimiser's: PyTorch's AdamW reads one step counter per parameter on a CPU, none on a GPU.
        "values asked for by the host a step": sum(n for phase, n in asked.items() if phase != "optimiser"),
        "waits for the GPU a step": gpu_waits(step) if device.type == "cuda" else None,
        "kernel launches a step": kernel_launches(step) if device.type == "cuda" else None,
        "compiled regions": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0),
        "graph breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
    }


def by_phase(step: contenders.Contender) -> tuple[dict[str, int], dict[str, int]]:
    """(operators, values that the host asks for) in each phase of a step."""
    operators, asked = {}, {}
    with OperatorCount() as counted:

        @contextlib.contextmanager
        def clock(phase: str):
            before = counted.total, counted.host_syncs
            yield
            operators[phase], asked[phase] = counted.total - before[0], counted.host_syncs - before[1]

        step.step(clock)
    return operators, asked


def gpu_waits(step) -> int:
    """Synchronising calls that PyTorch itself reports."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def kernel_launches(step) -> int:
    from torch.profiler import DeviceType, ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memset", "Memcpy")) for name in names)  # the card's memory does those itself


def counted_apart(preset: str) -> dict[str, float]:
    """What needs processes of its own, before which no torch was imported: two at a time."""
    with ThreadPoolExecutor(2) as both:
        running = [both.submit(count, preset) for count in (gpu_counts, host_counts, collective_counts)]
        return {name: number for counts in running for name, number in counts.result().items()}


def gpu_counts(preset: str) -> dict[str, float]:
    """Of one step on a GPU that is not there: launches, bytes and FLOPs (benchmarks.roofline)."""
    ours = answer_of("roofline", "--preset", preset, "--contenders", "ours")["ours"]
    of = f"a step on a GPU, {preset}"
    return {f"launches {of}": ours["launches"], f"bytes {of}": 1e9 * ours["gb"], f"FLOP {of}": 1e12 * ours["tflop"]}


def host_counts(preset: str) -> dict[str, float]:
    """Of one step under DeepSpeed, plain and as ZeRO-2 (benchmarks.host)."""
    stages = answer_of("host", "--counts", "--preset", preset, "--stages", "0", "2")["stages"]
    names = {"python calls": PYTHON_CALLS, "python calls in deepspeed": f"{PYTHON_CALLS} in DeepSpeed"}
    names |= {"operators": "operators under DeepSpeed"}
    return {
        f"{name} a step, stage {stage}, {preset}": counts[key]
        for stage, counts in stages.items()
        for key, name in names.items()
    }


def collective_counts(preset: str, world: int = 8) -> dict[str, float]:
    """Of one rank of many under ZeRO-2 (benchmarks.collectives)."""
    case = ("--world", str(world), "--stage", "2", "--deepspeed", "zero2_a100_80gb", "--preset", preset)
    (row,) = answer_of("collectives", *case, statuses=(0, 1))["rows"]
    return {
        f"ranks differ in their collectives, {world} ranks, {preset}": int(row["difference"] is not None),
        f"collectives a step, {world} ranks, {preset}": row["collectives a step"],
        f"bytes handed to collectives a step, {world} ranks, {preset}": row["bytes a step"],
    }


def answer_of(module: str, *arguments: str, statuses: tuple[int, ...] = (0,)) -> dict:
    """The JSON that a command of this folder prints.

    Args:
        statuses: with which it may end.

    Raises:
        CountingError: it failed, or took too long; with the end of what it said.
    """
    command = [sys.executable, "-W", "ignore", *program(module), "--json", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=measure.ROOT, env=variables, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise CountingError(f"benchmarks.{module} was not done after {LONGEST} s") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:  # it ended before it had anything to print
        found = None
    if done.returncode not in statuses or found is None:
        raise CountingError(f"benchmarks.{module} failed: {done.stderr.strip()[-2000:]}")
    return found


def program(module: str) -> tuple[str, ...]:
    """What Python is asked to run; a function of its own, for a test to plant a change of the step before it."""
    return "-m", f"benchmarks.{module}"


def instruction_count(statement: str, setup: str, number: int = 100) -> float | None:
    """Instructions of one call under callgrind; None where valgrind is not installed."""
    if shutil.which("valgrind") is None:
        return None
    from torch.utils.benchmark import Timer

    # It starts whatever is called "python": that must be this interpreter, with these packages.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with mock.patch.dict(os.environ, PATH=path):
        return Timer(statement, setup=setup).collect_callgrind(number=number).counts(denoise=True) / number
