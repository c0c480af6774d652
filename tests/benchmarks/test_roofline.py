"""What is counted on tensors without values: known operators exactly, whole steps as other counts of them say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from albef_ds.tasks.contrastive import Contrastive
from albef_ds.tasks.registry import TASKS
from albef_ds.training.flops import FlopCount
from benchmarks import chips, flops, measure, predictions, roofline, workload

TINY = predictions.STEPS[2]

# Operators on [64, 32] in bf16 and fp32, one after the other, under their names as phases.
KNOWN = """
from benchmarks import fake_gpu
mode = fake_gpu.install()
import json, os, torch
from flash_attn import flash_attn_varlen_qkvpacked_func as flash
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from benchmarks.counting import Replay
from benchmarks.launches import LaunchCount

aten = torch.ops.aten
with mode:
    half = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    single = lambda *shape: torch.empty(shape, device="cuda")
    rows = torch.empty(8, dtype=torch.int64, device="cuda")
    a, b, x, y = half(64, 32), half(32, 16), single(64, 32), single(64, 32)
    words = torch.empty(4096, dtype=torch.int64, device="cuda")
    images, kernel = single(2, 3, 8, 8), single(6, 3, 4, 4)
    large = [single(325 * 65536), *(single(5) for _ in range(64))]
    list_of = lambda number: [single(4) for _ in range(number)]
    qkv, bounds = half(10, 3, 2, 16), torch.empty(3, dtype=torch.int32, device="cuda")
    heads, packed = half(2, 2, 16, 16).requires_grad_(), half(10, 2, 16).requires_grad_()

    def sdpa(backend):
        with sdpa_kernel(backend):
            attended = scaled_dot_product_attention(heads, heads.detach(), heads.detach())
            torch.autograd.grad(attended, heads, heads.detach())

    many = [single(70000) for _ in range(192)], [single(70000) for _ in range(192)]
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
        "into a third": lambda: torch.add(x, y, out=single(64, 32)),
        "ids written": lambda: torch.zeros(99, dtype=torch.int64, device="cuda").index_copy_(0, rows, rows),
        "a number written": lambda: a.scatter_(1, rows.view(8, 1), 1.0),
        "rows added": lambda: x.index_add_(0, rows, y[:8]),
        "gradient of a row": lambda: aten.select_backward(y[0], [64, 32], 0, 3),
        "gradient of a column": lambda: aten.select_backward(y[:, 0], [64, 32], 1, 3),
        "gradient of rows": lambda: aten.slice_backward(y[:8], [64, 32], 0, 8, 16, 1),
        "gradient of every other": lambda: aten.slice_backward(y[:8], [64, 32], 0, 8, 24, 2),
        "gradient of columns": lambda: aten.slice_backward(y[:, :8], [64, 32], 1, 8, 16, 1),
        "ends padded": lambda: aten.constant_pad_nd(y[0], [2, 1], 0.0),
        "rows padded": lambda: aten.constant_pad_nd(y, [0, 0, 3, 0], 0.0),
        "columns padded": lambda: aten.constant_pad_nd(y, [1, 0], 0.0),
        "gradient of the loss": lambda: aten.nll_loss_backward(single(), y[:8], rows, None, 2, -100, single()),
        "whole copy": lambda: x.copy_(y),
        "turned copy": lambda: x.t().contiguous(),
        "from the host": lambda: torch.ones(64, 32).to("cuda"),
        "to the host": lambda: single(1).to("cpu"),
        "shape of another": lambda: (x.new_zeros(3), torch.zeros_like(a)),
        "onto a copy": lambda: x.index_copy(0, rows, y[:8]),
        "added onto a copy": lambda: x.t().scatter_add(1, rows.view(1, 8), y[:1, :8]),
        "places written": lambda: aten.index_put_(x, [rows], y[:8]),
        "places added": lambda: aten.index_put_(x, [rows], y[:8], True),
        "running sum": lambda: rows.cumsum(0),
        "order": lambda: rows.sort(),
        "norm backward": lambda: aten.native_layer_norm_backward(
            y, x, [32], single(64, 1), single(64, 1), single(32), single(32), [True, True, True]
        ),
        "convolution backward": lambda: aten.convolution_backward(
            single(2, 6, 5, 5), images, kernel, [6], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, True]
        ),
        "adam": lambda: torch._fused_adamw_(
            *(list_of(37) for _ in range(4)), [], [single() for _ in range(37)],
            lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        ),
        "lists multiplied": lambda: torch._foreach_mul_(list_of(111), 0.5),
        "lists multiplied by their own": lambda: torch._foreach_mul_(list_of(97), [0.5] * 97),
        "lists added": lambda: torch._foreach_add_(list_of(65), list_of(65)),
        "lists added into others": lambda: torch._foreach_add(list_of(49), list_of(49)),
        "lists blended by a list": lambda: torch._foreach_lerp_(list_of(49), list_of(49), list_of(49)),
        "lists of two dtypes": lambda: torch._foreach_add_(list_of(5), [half(4) for _ in range(5)]),
        "lists copied": lambda: torch._foreach_copy_(list_of(65), [half(4) for _ in range(65)]),
        "norms": lambda: torch._foreach_norm(list_of(111)),
        "gradient of few lookups": lambda: aten.embedding_dense_backward(y[:8], rows, 64, -1, False),
        "gradient of many lookups": lambda: aten.embedding_dense_backward(single(4096, 4), words, 5, -1, False),
        "loss": lambda: aten.nll_loss_forward(y[:8], rows, None, 2, -100),
        "mixed": lambda: aten.cat([a, x]),
        "alike": lambda: aten.cat([x, y]),
        "convolution": lambda: torch.conv2d(images, kernel, single(6)),
        "convolution without bias": lambda: torch.conv2d(images, kernel),
        "counters": lambda: torch._foreach_add_([single(1) for _ in range(264)], 1),
        "one large, many small": lambda: torch._foreach_lerp_(large, large, 0.5),
        "a number to the host": lambda: single(1).item(),
        "attention by flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "attention by efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "attention by varlen": lambda: varlen_attn(
            packed, packed.detach(), packed.detach(), bounds, bounds, 7, 7
        ).backward(packed.detach()),
        "attention": lambda: flash(qkv, bounds, 7),
        "attention, both ways": lambda: flash(qkv.requires_grad_(), bounds, 7).sum().backward(),
    }
    leaf = single(64, 32).requires_grad_()
    backward = {"lookup": leaf.index_select(0, rows), "places": leaf[rows]}
    with Replay([3.0]), LaunchCount() as count:  # the one number that is asked for
        for name, step in steps.items():
            with count.phase(name):
                step()
    for name, looked_up in backward.items():
        with LaunchCount() as count_backward, count_backward.phase("backward"):
            looked_up.backward(y[:8])
        leaf.grad = None
        count.work |= {(name, operator): work for (_, operator), work in count_backward.work.items()}
found = {name: [work.launches, work.bytes, work.flops, work.bf16_flops] for name, work in count.phases().items()}
print(json.dumps(found), flush=True)
os._exit(0)  # autograd's threads may let go of a tensor while Python ends, which aborts a process that is done
"""
ALL = 64 * 32  # elements
CONVOLVED = 2 * 2 * 6 * 25 * 48  # 2 images, 6 channels of 5 x 5, 48 products each
PAIRS = 2 * (10 * 10 // 2) * 2 * 16  # a product of 10 rows in two runs, 2 heads of 16 numbers
ROWS = 10 * 2 * 16  # elements of q, of k, of v and of the result
ATTENDED = 2 * (3 * ROWS + ROWS) + 4 * 2 * 10 + 4 * 3 + 8 * 2  # bf16; fp32 sums of the softmax; bounds; the seed
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
    "many": [3, 3 * 4 * 192 * 70000, 0, 0],  # 64 tensors a launch
    "on the host": [0, 0, 0, 0],
    "into a third": [1, 3 * 4 * ALL, 0, 0],
    "ids written": [2, 8 * 99 + 8 * (2 * 8 + 8), 0, 0],  # zeros first
    "a number written": [1, 2 * 2 * 8 + 8 * 8, 0, 0],
    "rows added": [1, 3 * 4 * 8 * 32 + 8 * 8, 0, 0],
    # Zeros, and a copy: of memory as it lies, or by a kernel.
    "gradient of a row": [1, 4 * (32 + ALL), 0, 0],
    "gradient of a column": [2, 4 * (64 + ALL), 0, 0],
    "gradient of rows": [1, 4 * (8 * 32 + ALL), 0, 0],
    "gradient of every other": [2, 4 * (8 * 32 + ALL), 0, 0],
    "gradient of columns": [2, 4 * (64 * 8 + ALL), 0, 0],
    "ends padded": [1, 4 * (32 + 35), 0, 0],
    "rows padded": [1, 4 * (ALL + 67 * 32), 0, 0],
    "columns padded": [2, 4 * (ALL + 64 * 33), 0, 0],
    # Zeros, and of each row one number; the targets, the total weight and the loss's own gradient.
    "gradient of the loss": [2, 4 * 8 + 8 * 8 + 4 * 8 * 32, 0, 0],
    "whole copy": [0, 2 * 4 * ALL, 0, 0],
    "turned copy": [1, 2 * 4 * ALL, 0, 0],
    "from the host": [0, 2 * 4 * ALL, 0, 0],
    "to the host": [0, 2 * 4, 0, 0],
    "a number to the host": [0, 4, 0, 0],
    "shape of another": [2, 4 * 3 + 2 * ALL, 0, 0],
    "onto a copy": [1, 4 * (2 * ALL + 8 * 32) + 8 * 8, 0, 0],
    "added onto a copy": [2, 4 * (2 * ALL + 8) + 8 * 8, 0, 0],  # of another order
    "places written": [1, 2 * 4 * 8 * 32 + 8 * 8, 0, 0],
    "places added": [6, 3 * 4 * 8 * 32 + 8 * 8, 0, 0],
    "running sum": [2, 2 * 8 * 8, 0, 0],
    "order": [2, 3 * 8 * 8, 0, 0],
    "norm backward": [2, 4 * (2 * ALL + 2 * 64 + 2 * 32 + ALL + 2 * 32), 0, 0],
    "convolution backward": [2, 4 * (2 * 6 * 25 + 2 * 3 * 64 + 6 * 48 + 6 * 48 + 6), CONVOLVED, 2 * CONVOLVED],
    "adam": [2, 37 * 4 * (4 * 4 + 3 * 4 + 1), 0, 0],  # the gradients and the step's number are read alone
    "lists multiplied": [2, 111 * 4 * 8, 0, 0],
    "lists multiplied by their own": [2, 97 * 4 * 8, 0, 0],
    "lists added": [2, 65 * 4 * 12, 0, 0],
    "lists added into others": [2, 49 * 4 * 12, 0, 0],
    "lists blended by a list": [2, 49 * 4 * 16, 0, 0],
    "lists of two dtypes": [5, 5 * 4 * (4 + 2 + 4), 0, 0],  # one by one
    "lists copied": [2, 65 * 4 * (2 + 4), 0, 0],
    "norms": [3, 111 * 4 * 4 + 111 * 4, 0, 0],
    # As with values: zeros, and the rows added to them, in place.
    "lookup": [2, 4 * ALL + 3 * 4 * 8 * 32 + 8 * 8, 0, 0],
    "places": [1 + 6, 4 * ALL + 3 * 4 * 8 * 32 + 8 * 8, 0, 0],
    "gradient of few lookups": [2, 4 * (8 * 32 + ALL) + 8 * 8, 0, 0],
    "gradient of many lookups": [5, 4 * (4096 * 4 + 5 * 4) + 8 * 4096, 0, 0],
    "loss": [1, 4 * 8 + 8 * 8 + 2 * 4, 0, 0],  # the loss and the total weight
    "mixed": [2, 2 * ALL + 4 * ALL + 4 * 2 * ALL, 0, 0],
    "alike": [1, 4 * 4 * ALL, 0, 0],
    "convolution": [2, 4 * (2 * 3 * 64 + 6 * 48 + 6 + 2 * 6 * 25), CONVOLVED, 2 * CONVOLVED],
    "convolution without bias": [1, 4 * (2 * 3 * 64 + 6 * 48 + 2 * 6 * 25), CONVOLVED, 2 * CONVOLVED],
    "counters": [3, 2 * 4 * 264, 0, 0],  # 110 tensors a launch
    # 320 blocks of the large one; its last five with 63 small ones; the last small one.
    "one large, many small": [3, 2 * 4 * (325 * 65536 + 64 * 5), 0, 0],
    "attention": [1, ATTENDED, 2 * PAIRS, 2 * PAIRS],
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


def test_attention_backward_writes_its_gradients_and_reads_none(known):
    """Three kernels: the result times its gradient, all three gradients, and dq to its dtype."""
    launches, moved, flops, _ = known["attention, both ways"]
    assert flops == (2 + 5) * PAIRS
    assert launches == 1 + 1 + 1 + 3  # forward, the sum, its gradient, backward
    read = 2 * 4 * ROWS + 4 * 2 * 10 + 4 * 3 + 8 * 2 + 2  # q, k, v, result; sums, bounds, seed, one number's gradient
    written = 2 * 3 * ROWS + 4 * 2 * (10 + 2 * 128)  # dq, dk, dv; of each run so many rows of sums more
    assert moved - ATTENDED - (2 * ROWS + 2) - 2 == read + written  # the sum and its gradient


@pytest.mark.parametrize("kernel, zeros", [("flash", 0), ("efficient", 0), ("varlen", 2)])
def test_attention_backward_of_torch_is_three_kernels(known, kernel, zeros):
    """And one forward; varlen makes its own empty sums before."""
    assert known[f"attention by {kernel}"][0] == 1 + 3 + zeros


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict:
    """One step of the tiny model by each contender, eight captions; also written into a folder."""
    folder = tmp_path_factory.mktemp("roofline")
    found = counted(*TINY, "--out", str(folder))
    assert json.loads((folder / "roofline.json").read_text()) == found
    assert "| all |" in (folder / "roofline.md").read_text()
    assert (folder / "roofline.png").stat().st_size > 10_000
    return found


def test_flops_are_those_that_benchmarks_flops_counts(steps, monkeypatch):
    """The reference's to the digit; ours in the products of matrices, once a CPU sets aside the rows that a GPU does
    for negatives it has not seen. Attention on a CPU pads what a GPU does not."""
    config = workload.preset("tiny", dropout=0.0)
    expected = flops.per_sample(config, workload.lengths_of("mean14", 8))
    assert steps["reference"]["tflop"] * 1e12 == pytest.approx(8 * expected["reference"], rel=1e-12)
    monkeypatch.setattr(Contrastive, "room", lambda self, tokens, _: tokens)
    _, step = flops.ours(config, workload.captions_batch(config, "mean14", 8))
    with FlopCount() as really:
        step()
    names = ("mm", "addmm", "bmm", "convolution", "convolution_backward")
    products = sum(really.get_flop_counts()["Global"].get(getattr(torch.ops.aten, name), 0) for name in names)
    assert steps["ours"]["groups"]["matrix products"]["tflop"] * 1e12 == pytest.approx(products, rel=1e-12)


def test_the_newest_predictions_are_of_these_steps(steps):
    """Otherwise a step or a count has changed since: `python -m benchmarks.predictions`."""
    committed = {
        step["contender"]: step
        for step in predictions.newest()["steps"]
        if step["preset"] == "tiny" and step.get("attention", "flash") == "flash"
    }
    for name, contender in roofline.CONTENDERS.items():
        for key in ("launches", "gb", "tflop"):
            assert committed[contender][key] == pytest.approx(steps[name][key], rel=1e-9), (name, key)


def test_a_groups_time_is_that_of_its_slower_limit(steps):
    """Attention of ours is bf16: its FLOPs count as they are; products of the reference run in TF32, at half of it."""
    for name, group, slower in (("ours", "attention", 1), ("reference", "matrix products", 2)):
        row = steps[name]["groups"][group]
        limits = slower * row["tflop"] * 1e12 / 790e12, row["gb"] * 1e9 / 3.35e12
        assert row["ms"]["H100"] == pytest.approx(1e3 * max(limits))


@pytest.mark.parametrize("name", roofline.CONTENDERS)
def test_groups_and_phases_add_up(steps, name):
    found = steps[name]
    assert set(found["ms"]) == set(chips.CHIPS)
    for key in ("launches", "gb", "tflop"):
        for parts in (found["groups"], found["phases"]):
            assert sum(part[key] for part in parts.values()) == pytest.approx(found[key])
    for chip, ms in found["ms"].items():
        assert sum(group["ms"][chip] for group in found["groups"].values()) == pytest.approx(ms)
    assert set(found["phases"]) == {"teacher", "forward", "backward", "optimiser", "queue"}


def test_our_kernels_are_in_the_step_as_they_are_launched(steps):
    assert {name: row["launches"] for name, row in steps["ours"]["own kernels"].items()} == {
        **dict.fromkeys(("statistics", "combine", "gradient", "reduce", "finish"), 1),
        "_race": 2,
    }
    assert steps["reference"]["own kernels"] == {}


def test_tasks_are_those_of_recipes():
    assert set(roofline.TASKS) == set(TASKS)


def test_a_rate_is_the_larger_limit():
    chip = chips.Chip(flops=1e12, bandwidth=1e9, source="made up")
    assert chip.milliseconds(flops=2e12, moved=1e9) == 2000
    assert chip.milliseconds(flops=1e12, moved=3e9) == 3000


@pytest.mark.parametrize(
    "device, card",
    [
        *(("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200")),
        *(("NVIDIA B200", "B200"), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("NVIDIA H100 PCIe", None)),
        *(("NVIDIA H100 NVL", None), ("NVIDIA A100-PCIE-40GB", None), ("AMD EPYC", None)),
    ],
)
def test_a_card_is_known_by_its_name_and_a_slower_one_is_not_taken_for_it(device, card):
    assert chips.chip_of(device) == card


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--task", "vqa", "--contenders", "reference"], "knows pre-training alone"),
        (["--batch", "0"], "at least 1"),
        (["--dropout", "2"], "from 0 to 1"),
        (["--out", __file__], "is a file, and a folder is needed"),
        (["--out", f"{__file__}/figures"], "is a file, and a folder is needed"),
    ],
)
def test_what_cannot_be_counted_ends_with_2_and_a_sentence(arguments, said):
    command = [sys.executable, "-m", "benchmarks.roofline", "--preset", "tiny", *arguments]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
