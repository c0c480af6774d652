"""What PyTorch's counter does not know: attention on packed rows, and the contrastive loss."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from albef_ds.kernels import queue_contrastive_loss
from albef_ds.model.spans import Spans
from albef_ds.training import flops
from albef_ds.training.flops import FlopCount

RUNS = ([3, 1, 7], [2, 9, 4])  # of queries and of keys
HEADS, DIM = 2, 8


def shapes(index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of one run, as scaled_dot_product_attention takes them."""
    return tuple((1, HEADS, lengths[index], DIM) for lengths in RUNS)


def run_by_run(backward: bool) -> int:
    """What PyTorch counts for each run alone."""
    counted = 0
    for i in range(len(RUNS[0])):
        q, k = shapes(i)
        counted += sdpa_backward_flop_count(q, q, k, k) if backward else sdpa_flop_count(q, k, k)
    return counted


def bounds(device: str = "cpu") -> list[torch.Tensor]:
    return [torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in RUNS]


def arguments(operator, batched: bool) -> dict:
    """What the formulas read of a call; an operator's other arguments are nobody's business here."""
    cu_q, cu_k = bounds()
    q, k = (
        torch.zeros(cu[-1], HEADS, DIM)[None] if batched else torch.zeros(cu[-1], HEADS, DIM) for cu in (cu_q, cu_k)
    )
    given = {"q": q, "query": q, "k": k, "key": k}
    given |= {
        "cu_seqlens_q": cu_q,
        "cu_seq_q": cu_q,
        "cum_seq_q": cu_q,
        "cu_seqlens_k": cu_k,
        "cu_seq_k": cu_k,
        "cum_seq_k": cu_k,
    }
    return {a.name: given.get(a.name) for a in operator.default._schema.arguments}


@pytest.mark.parametrize("name", flops.PACKED_ATTENTION)
def test_packed_attention_counts_what_its_runs_cost_one_by_one(name: str):
    flops._register_optional()
    namespace, operator = name.split("::")
    if not hasattr(getattr(torch.ops, namespace), operator):
        pytest.skip(f"{namespace} is not installed (tests/rehearsal counts its steps)")
    packet = getattr(getattr(torch.ops, namespace), operator)
    count = FlopCount().flop_registry[packet]
    given = arguments(packet, batched="efficient" in operator)
    assert count(*given.values()) == run_by_run(backward="backward" in operator)
    keywords = list(given)[4:]
    assert count(*list(given.values())[:4], **{k: given[k] for k in keywords}) == count(*given.values())


def test_a_bound_far_above_the_lengths_costs_nothing():
    """PyTorch's own formula takes every run for as long as the longest may be."""
    q, (cu_q, cu_k) = torch.randn(1, 11, HEADS, DIM, device="meta"), bounds("meta")
    k = torch.randn(1, 15, HEADS, DIM, device="meta")

    def counted(mode) -> int:
        with mode:
            torch.ops.aten._efficient_attention_forward(q, k, k, None, cu_q, cu_k, 1000, 9, 0.0, 0, True)
        return mode.get_total_flops()

    assert counted(FlopCount()) == 2 * 2 * (11 * 15 // 3) * HEADS * DIM
    assert counted(FlopCounterMode(display=False)) > 50 * counted(FlopCount())


def test_without_values_keys_count_as_equally_long():
    images = Spans.equal(3, 5, "cpu")  # three images of five patches, looked at by texts of any length
    exact = flops.query_key_pairs(bounds()[0], images.cu_seqlens, 11, 15)
    assert flops.query_key_pairs(bounds("meta")[0], images.cu_seqlens.to("meta"), 11, 15) == exact == 55


def test_a_runs_own_count_knows_the_loss():
    """`train` and `--dry-run` count with the same class as the benchmarks."""
    feats = [torch.nn.functional.normalize(torch.randn(4, 16), dim=1) for _ in range(4)]
    queues = [torch.nn.functional.normalize(torch.randn(10, 16), dim=1) for _ in range(2)]
    feats[0].requires_grad_()
    with FlopCount() as counted:
        queue_contrastive_loss(*feats, *queues, torch.tensor([0.07]), 0.4)
    assert counted.total == 2 * 3 * 2 * 4 * 14 * 16
