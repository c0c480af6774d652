"""Bytes and products that are counted in Triton's interpreter (benchmarks/kernel_traffic.py)."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from albef_ds.kernels import launch, queue_contrastive_triton
from albef_ds.kernels.launch import Plan, Tile
from benchmarks import kernel_traffic
from benchmarks.kernel_traffic import Problem


@pytest.fixture(autouse=True)
def interpreted(triton_runs):
    if not launch.interpreted():
        pytest.skip(
            "this process compiles its kernels for the GPU; what is counted is Triton's interpreter, on any CPU"
        )


@triton.jit
def copy_again(source, target, n, times, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(times):
        tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    found = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]))
    tl.store(c + m[:, None] * N + n[None, :], found)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.float16, 2)])
@pytest.mark.parametrize("times", [1, 3])
def test_a_copy_reads_and_writes_every_element(dtype, size, times):
    n = 1000  # the last of four programs has a mask
    source, target = torch.ones(n, dtype=dtype), torch.zeros(n, dtype=dtype)
    with kernel_traffic.counting() as found:
        copy_again[(4,)](source, target, n, times, BLOCK=256)
    assert target.eq(1).all()
    assert found.launches == {"copy_again": 1}
    assert found.asked == {"copy_again": times * 2 * n * size}
    assert found.least == {"copy_again": 2 * n * size}


def test_a_product_is_counted_with_what_it_reads():
    a, b, c = torch.ones(16, 64), torch.ones(64, 32), torch.zeros(16, 32)
    with kernel_traffic.counting() as found:
        product[(1,)](a, b, c, 16, 32, 64)
    assert c.eq(64).all()
    assert found.flops == {"product": 2 * 16 * 32 * 64}
    assert found.asked == found.least == {"product": 4 * (a.numel() + b.numel() + c.numel())}


PLANS = {
    "whole": Plan(Tile(16, 32), Tile(16, 16), splits=3),
    "by pieces of D, gradients by chunks": Plan(
        Tile(16, 16, block_k=16), Tile(16, 32, block_k=16, block_o=16), splits=3
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(11, 32 * 4, 24, torch.float32),
        Problem(5, 32 * 4, 20, torch.bfloat16, with_ids=True, with_queue_ids=True),
        Problem(3, 32 * 4, 24, torch.float32, with_grad=False),
    ],
)
def test_short_runs_tell_what_a_whole_one_does(problem: Problem, plan: Plan, monkeypatch):
    features = [torch.zeros(problem.batch, problem.dim, dtype=problem.dtype) for _ in range(4)]
    queues = [torch.zeros(problem.length, problem.dim, dtype=problem.dtype) for _ in range(2)]
    ids = [torch.zeros(n, dtype=torch.int64) if problem.with_ids else None for n in (problem.batch, problem.length)]
    monkeypatch.setattr(launch, "plan", lambda *_, **__: plan)
    with kernel_traffic.counting() as whole:
        queue_contrastive_triton.forward(*features, *queues, torch.ones(1), torch.zeros(()), *ids, problem.with_grad)
    told = kernel_traffic.contrastive(problem, plan)
    for counter in ("launches", "asked", "least", "flops"):
        found, real = getattr(told, counter), getattr(whole, counter)
        assert {name: found[name] for name in whole.launches} == {name: real[name] for name in whole.launches}, counter


def test_the_queues_are_read_once_a_pass():
    """What the loss is for: no logits in memory."""
    problem, plan = Problem(16, 65536, 16, torch.bfloat16), Plan(Tile(16, 64), Tile(16, 64), splits=8)
    found = kernel_traffic.contrastive(problem, plan)
    queues, logits = 2 * 65536 * 16 * 2, 2 * 16 * 65536 * 4
    for kernel in ("statistics", "gradient"):
        assert queues < found.least[kernel] < queues + logits


def test_a_draw_reads_logits_and_noise_once():
    found = kernel_traffic.negatives(24, with_ids=False)
    # Of each row all candidates but the sample itself; an index of eight bytes comes out.
    assert found.asked == {"_race": 2 * 24 * 23 * 4 + 24 * 8}
