"""What the suite runs, part by part, in order of worth: each lane a process with a time limit.

A part fits into ten minutes of a GPU. On a CPU the same lanes run on smaller models, where they mean something there.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = {
    1: "does it run: kernels, parity, every task with every attention, and no waiting for the device",
    2: "how fast: kernels, and whole steps against both rivals",
    3: "a real run: the demo under DeepSpeed and its collectives, ViT-B's dry run at 64, memory",
    4: "where the time goes: profile, largest batch, compiled regions, apex",
    5: "decoding: DALI alone, and feeding the step",
}
BOTH, GPU, CPU = ("cuda", "cpu"), ("cuda",), ("cpu",)


@dataclass(frozen=True)
class Lane:
    """One process of Python: `command` after the interpreter, "{out}" being the lane's own folder.

    Args:
        seconds: that it may take at most.
        on: the kinds of device it is for.
        needs: a package of `albef_ds.optional` without which the lane is "not installed".
        no_baseline: the exit status that means "nothing to compare with" and is no failure.
    """

    name: str
    part: int
    command: tuple[str, ...]
    seconds: float
    on: tuple[str, ...] = BOTH
    needs: str | None = None
    no_baseline: int | None = None


def lanes(kind: str, parts: tuple[int, ...] = tuple(PARTS)) -> list[Lane]:
    """Those of the parts for this kind of device, in order."""
    found = [*runs(kind), *speeds(kind), *real_run(kind), *details(kind), *decoding(kind)]
    return [lane for lane in found if lane.part in parts and kind in lane.on]


def pytest(*arguments: str, processes: int = 4) -> tuple[str, ...]:
    """A line for each test as it ends (-vv undoes the project's -q), on several processes."""
    return ("-m", "pytest", "-vv", "-p", "no:cacheprovider", "-n", str(processes), *arguments)


def runs(kind: str) -> list[Lane]:
    # One test of the sampler makes the device assert, in a process of its own; the whole grid is part 3's.
    grid = ("--deselect", "tests/kernels/test_queue_contrastive.py::test_triton_holds_on_the_whole_grid")
    model = ("tests/model", "tests/tasks", "tests/test_reference_parity.py", "--ignore", "tests/tasks/test_on_gpu.py")
    if kind == "cpu":  # Triton's interpreter wants an older NumPy than such a machine may have; CI runs it
        model += ("-k", "not triton")
    return [
        Lane("tasks on a GPU", 1, pytest("tests/tasks/test_on_gpu.py", processes=2), 150, GPU),
        Lane("kernel tests", 1, pytest("tests/kernels", *grid, processes=8), 210, GPU),
        Lane("model, task and parity tests", 1, pytest(*model), 150 if kind == "cuda" else 600),
        Lane("compiled kernels", 1, ("-m", "benchmarks.compile_report", "--quick", "--out", "{out}"), 60),
    ]


def speeds(kind: str) -> list[Lane]:
    step = ("-m", "benchmarks.step", "--captions", "histogram", "--out", "{out}")
    if kind == "cpu":
        size = ("--preset", "small", "--seconds", "30")
        return [
            Lane("kernels", 2, ("-m", "benchmarks.kernels", "--out", "{out}", "--seconds", "0.2"), 120),
            Lane("step, reference", 2, (*step, *size, "--contenders", "ours bf16", "ours fp32", "reference"), 240),
            Lane("step, modernised", 2, (*step, *size, "--contenders", "ours bf16", "modernised"), 240),
            Lane("flops", 2, ("-m", "benchmarks.flops", "--json"), 240),
            Lane("host", 2, ("-m", "benchmarks.host", "--out", "{out}"), 120),
        ]
    tuning = ("-m", "albef_ds.kernels.tuning", "--batch", "64", "--length", "65536", "--seconds", "25")
    core = ("--batches", "64", "512", "--lengths", "65536", "--seconds", "0.5", "--minutes", "1.3")
    seconds = ("--seconds", "15", "--minutes", "2.5")
    return [
        Lane("tiles tuned", 2, tuning, 45),
        Lane("kernels, core", 2, ("-m", "benchmarks.kernels", "--out", "{out}", *core), 105),
        Lane("step, reference", 2, (*step, *seconds, "--contenders", "ours bf16", "reference"), 120),
        Lane("step, modernised", 2, (*step, *seconds, "--contenders", "ours bf16", "modernised"), 200),
        Lane("step, ours in fp32", 2, (*step, *seconds, "--contenders", "ours bf16", "ours fp32"), 90),
        Lane("host", 2, ("-m", "benchmarks.host", "--seconds", "8", "--out", "{out}"), 40),
    ]


def real_run(kind: str) -> list[Lane]:
    short = () if kind == "cuda" else ("train.max_steps=40", "schedule.warmup_steps=10", "evaluation.k_test=4")
    demo = ("-m", "albef_ds", "demo", "--output", "{out}/run", *short)
    dry = ("-m", "benchmarks.dry_run", "--out", "{out}")
    memory = ("-m", "benchmarks.step", "--minutes", "0", "--memory", "--out", "{out}", "--captions", "histogram")
    memory += ("--contenders", "ours bf16", "reference", "modernised")
    small = ("--preset", "small") if kind == "cpu" else ()
    grid = pytest("tests/kernels/test_queue_contrastive.py", "-k", "whole_grid", processes=8)
    return [
        Lane("dry run of ViT-B at 64", 3, dry if kind == "cuda" else (*dry, "--batch", "4"), 90),
        Lane("demo", 3, demo, 270 if kind == "cuda" else 400),
        Lane("memory", 3, (*memory, *small), 100),
        Lane("kernels on the whole grid", 3, grid, 120, GPU),
    ]


def details(kind: str) -> list[Lane]:
    step = ("-m", "benchmarks.step", "--captions", "histogram", "--out", "{out}")
    small = ("--preset", "small") if kind == "cpu" else ()
    ours = ("--contenders", "ours bf16")
    sizes = ("--only-sizes", "--sizes-minutes", "2" if kind == "cuda" else "0.5")
    compiled = ("-m", "benchmarks.compile", "--out", "{out}", "--seconds", "30", "--sizes")
    compiled += ("base",) if kind == "cuda" else ("tiny",)
    apex = ("--seconds", "15", "--minutes", "1", "--contenders", "ours bf16", "ours bf16 apex")
    regress = ("-m", "benchmarks.regress")
    return [
        Lane("profile", 4, (*step, *small, *ours, "--seconds", "3", "--minutes", "0.3", "--profile"), 80),
        Lane("batch sizes", 4, (*step, *small, *sizes, "--contenders", "ours bf16", "reference"), 140),
        Lane("compiled regions", 4, compiled, 120),
        Lane("apex", 4, (*step, *apex), 70, GPU, needs="apex"),
        Lane("regress", 4, (*regress, "--results", "{out}", "--seconds", "15"), 90, GPU, no_baseline=3),
        Lane("regress", 4, (*regress, "--counts-only"), 240, CPU, no_baseline=3),
        Lane("baseline", 4, (*regress, "--record", "--baseline", "{out}/baseline.json", "--seconds", "15"), 100, GPU),
    ]


def decoding(kind: str) -> list[Lane]:
    loader = ("-m", "benchmarks.loader", "--json", "--out", "{out}")
    if kind == "cpu":
        few = ("--device", "cpu", "--size", "64", "--images", "60", "--rounds", "2", "--batch", "8", "--batches", "4")
        return [Lane("loader", 5, (*loader, *few, "--feed-step", "--preset", "tiny"), 240)]
    loader += ("--device", "cuda", "--batch", "64", "--workers", "4")
    return [
        Lane("decoding", 5, (*loader, "--lanes", "decoding", "loaders"), 290, GPU, needs="dali"),
        Lane("feeding the step", 5, (*loader, "--feed-step", "--lanes", "feeding"), 300),
    ]
