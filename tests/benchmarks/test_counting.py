"""Counts must be right before anything is compared by them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from albef_ds.training.flops import FlopCount
from benchmarks import flops, workload
from benchmarks.counting import OperatorCount, count_flops
from benchmarks.reference import PaddedBatch, ReferenceALBEF

TINY = workload.preset("tiny", dropout=0.0)
BATCH = workload.captions_batch(TINY, "mean14", 8)


@pytest.mark.parametrize("build, batch", [(flops.ours, BATCH), (flops.reference, PaddedBatch.from_packed(BATCH))])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_counted_without_values_equals_counted_really(build, batch, dropout):
    config = workload.preset("tiny", dropout)
    _, step = build(config, batch)
    with FlopCount() as real:
        step()
    assert real.total == count_flops(partial(build, batch=batch), config, flops.narrowed(config))


def forward_flops(step) -> int:
    with torch.no_grad(), FlopCount() as counted:
        step()
    return counted.total


def test_every_kind_of_attention_counts_alike():
    """Forward: two products each. (Backward, the fused kernels make one of them again and count it.)"""
    from albef_ds.tasks.pretraining import Pretraining

    ours = {}
    for backend in ("eager", "sdpa"):
        task = Pretraining(TINY.model_copy(update={"attention": backend}), sample_negatives=flops.next_one)
        ours[backend] = forward_flops(lambda task=task: task(BATCH))
    assert ours["eager"] == ours["sdpa"]

    padded = PaddedBatch.from_packed(BATCH)
    plain, sdpa = (ReferenceALBEF(TINY, modernised=m, compile_layers=False) for m in (False, True))
    assert forward_flops(lambda: plain(padded, 0.4)) == forward_flops(lambda: sdpa(padded, 0.4))


def test_attention_is_not_free():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    with FlopCount() as counted:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    product = 2 * 2 * 3 * 5 * 5 * 8
    assert counted.total == 7 * product


def test_operators_syncs_and_phases():
    x = torch.randn(4)
    with OperatorCount() as counted:
        (x + x).sum().item()
        x[x > 0]
    assert counted.operators["aten::add"] == 1
    assert counted.host_syncs >= 1


def test_the_head_numbers_hold_on_a_shallow_model_of_full_width():
    """Two layers of twelve, one of them fused, keep the claim's shape: less work, and least less for full captions."""
    config = workload.preset("base")
    vision = config.vision.model_copy(update={"layers": 2})
    text = config.text.model_copy(update={"layers": 2, "fusion_layer": 1})
    shallow = config.model_copy(update={"vision": vision, "text": text, "queue_size": 1024})
    ratios = [flops.per_sample(shallow, workload.lengths_of(captions, 8))["ratio"] for captions in ("mean14", "full")]
    assert ratios[0] < ratios[1] < 0.95


def test_captions():
    assert sum(workload.lengths_of("mean14", 8)) == 14 * 8
    assert set(workload.lengths_of("full", 3)) == {25}
    drawn = workload.lengths_of("histogram", 4000)
    assert 12 < sum(drawn) / len(drawn) < 14 and max(drawn) == 25
    assert drawn[:8] == workload.lengths_of("histogram", 8)
    with pytest.raises(ValueError, match="captions"):
        workload.lengths_of("short", 8)
    with pytest.raises(ValueError, match="preset"):
        workload.preset("huge")
