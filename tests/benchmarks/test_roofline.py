"""What is counted on tensors without values: known operators exactly, whole steps as other counts of them say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from albef_ds.tasks.registry import TASKS
from albef_ds.training.flops import FlopCount
from benchmarks import chips, flops, measure, roofline, workload

TINY = ["--preset", "tiny", "--batch", "8", "--captions", "full", "--dropout", "0"]

# Operators on [64, 32] in bf16 and fp32, one after the other, under their names as phases.
KNOWN = """
from benchmarks import fake_gpu
mode = fake_gpu.install()
import json, torch
from benchmarks.launches import LaunchCount

with mode:
    half = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    single = lambda *shape: torch.empty(shape, device="cuda")
    rows = torch.empty(8, dtype=torch.int64, device="cuda")
    a, b, x, y = half(64, 32), half(32, 16), single(64, 32), single(64, 32)
    many = [single(70000) for _ in range(130)], [single(70000) for _ in range(130)]
    steps = {
        "product": lambda: a @ b,
        "product in fp32": lambda: x @ y.t(),
        "sum of two": lambda: x + y,
        "in place": lambda: x.add_(y),
        "copy": lambda: x.copy_(a),
        "fill": lambda: x.zero_(),
        "expanded": lambda: x + y[0],
        "cast": lambda: x.to(torch.bfloat16),
        "views": lambda: x.view(32, 64).t()[1:, None].expand(-1, 5, -1).detach(),
        "rows read": lambda: x.index_select(0, rows),
        "rows written": lambda: x.index_copy_(0, rows, y[:8]),
        "many": lambda: torch._foreach_lerp_(*many, 0.5),
        "on the host": lambda: torch.ones(5) + 1,
    }
    with LaunchCount() as count:
        for name, step in steps.items():
            with count.phase(name):
                step()
found = {name: [work.launches, work.bytes, work.flops, work.slowness] for name, work in count.phases().items()}
print(json.dumps(found))
"""
ALL = 64 * 32  # elements
EXPECTED = {
    "product": [1, 2 * (ALL + 32 * 16 + 64 * 16), 2 * 64 * 32 * 16, 2 * 64 * 32 * 16],
    "product in fp32": [1, 4 * (2 * ALL + 64 * 64), 2 * 64 * 32 * 64, 2 * 2 * 64 * 32 * 64],
    "sum of two": [1, 3 * 4 * ALL, 0, 0],
    "in place": [1, 3 * 4 * ALL, 0, 0],
    "copy": [1, (2 + 4) * ALL, 0, 0],
    "fill": [1, 4 * ALL, 0, 0],
    "expanded": [1, 4 * (2 * ALL + 32), 0, 0],
    "cast": [1, (4 + 2) * ALL, 0, 0],
    "views": [0, 0, 0, 0],
    "rows read": [1, 2 * 4 * 8 * 32 + 8 * 8, 0, 0],
    "rows written": [1, 2 * 4 * 8 * 32 + 8 * 8, 0, 0],
    "many": [3, 3 * 4 * 130 * 70000, 0, 0],  # 48 tensors a launch
    "on the host": [0, 0, 0, 0],
}


def printed(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def counted(*arguments: str) -> dict:
    return json.loads(printed("-m", "benchmarks.roofline", "--json", *arguments))


@pytest.fixture(scope="module")
def known() -> dict:
    return json.loads(printed("-c", KNOWN))


@pytest.mark.parametrize("name", EXPECTED)
def test_known_operators_are_counted_right(known, name):
    assert known[name] == EXPECTED[name]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict:
    """Ours and the reference's step of the tiny model, eight full captions; also written into a folder."""
    folder = tmp_path_factory.mktemp("roofline")
    found = counted(*TINY, "--contenders", "ours", "reference", "--out", str(folder))
    assert json.loads((folder / "roofline.json").read_text()) == found
    assert "| all |" in (folder / "roofline.md").read_text()
    assert (folder / "roofline.png").stat().st_size > 10_000
    return found


def test_flops_are_those_that_benchmarks_flops_counts(steps):
    """With full captions no row is set aside, and without dropout attention on a CPU makes its scores twice, too. Of
    ours two things differ on a GPU: the loss's kernels make both logits a second time, and where only some rows are
    wanted attention does not pad them: little in the whole, nothing in the products of matrices."""
    config = workload.preset("tiny", dropout=0.0)
    expected = flops.per_sample(config, workload.lengths_of("full", 8))
    again = 2 * 2 * 2 * 8 * (8 + config.queue_size) * config.embed_dim
    assert steps["reference"]["tflop"] * 1e12 == pytest.approx(8 * expected["reference"], rel=1e-12)
    assert steps["ours"]["tflop"] * 1e12 == pytest.approx(8 * expected["ours"] + again, rel=0.03)

    _, step = flops.ours(config, workload.captions_batch(config, "full", 8))
    with FlopCount() as really:
        step()
    names = ("mm", "addmm", "bmm", "convolution", "convolution_backward")
    products = sum(really.get_flop_counts()["Global"].get(getattr(torch.ops.aten, name), 0) for name in names)
    assert steps["ours"]["groups"]["matrix products"]["tflop"] * 1e12 == pytest.approx(products, rel=1e-12)


@pytest.mark.parametrize("name", ["ours", "reference"])
def test_groups_and_phases_add_up(steps, name):
    found = steps[name]
    assert set(found["ms"]) == set(chips.CHIPS)
    for key in ("launches", "gb", "tflop"):
        for parts in (found["groups"], found["phases"]):
            assert sum(part[key] for part in parts.values()) == pytest.approx(found[key])
    for chip, ms in found["ms"].items():
        assert sum(group["ms"][chip] for group in found["groups"].values()) == pytest.approx(ms)
        for group in found["groups"].values():
            assert group["ms"][chip] >= 1e3 * 1e9 * group["gb"] / chips.CHIPS[chip].bandwidth * (1 - 1e-9)
    assert set(found["phases"]) == {"teacher", "forward", "backward", "optimiser", "queue"}


def test_our_kernels_are_in_the_step_as_they_are_launched(steps):
    assert {name: row["launches"] for name, row in steps["ours"]["own kernels"].items()} == {
        **dict.fromkeys(("statistics", "combine", "gradient", "reduce", "finish"), 1),
        "_race": 2,
    }
    assert steps["reference"]["own kernels"] == {}


PLANTED = """
from benchmarks import fake_gpu, roofline
fake_gpu.install()
import torch
from albef_ds.tasks.pretraining import Pretraining
start = Pretraining.start_step
Pretraining.start_step = lambda *a, **k: (start(*a, **k), torch.empty(250_000_000, device="cuda").neg_())
roofline.main(%r)
"""


def test_one_launch_and_its_bytes_are_seen(steps):
    """Planted in the step: the negative of 250 M numbers, in place."""
    more = json.loads(printed("-c", PLANTED % [*TINY, "--contenders", "ours", "--json"]))["ours"]
    assert more["launches"] == steps["ours"]["launches"] + 1
    assert more["gb"] == pytest.approx(steps["ours"]["gb"] + 2.0)


def test_tasks_are_those_of_recipes():
    assert set(roofline.TASKS) == set(TASKS)


def test_a_rate_is_the_larger_limit():
    chip = chips.Chip(flops=1e12, bandwidth=1e9, source="made up")
    assert chip.milliseconds(flops=2e12, moved=1e9) == 2000
    assert chip.milliseconds(flops=1e12, moved=3e9) == 3000
    assert [chips.chip_of(name) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "AMD EPYC")] == [
        "A100",
        "H200",
        None,
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [(["--task", "vqa", "--contenders", "reference"], "knows pre-training alone"), (["--batch", "0"], "at least 1")],
)
def test_what_cannot_be_counted_ends_with_2_and_a_sentence(arguments, said):
    command = [sys.executable, "-m", "benchmarks.roofline", "--preset", "tiny", *arguments]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
