"""Compiled regions compute what they compute eagerly, in one graph for all lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from albef_ds.model.text import ResidualOutput
from albef_ds.training.compile import compile_regions
from tests.tiny import tiny_model


def region(dropout: float = 0.0) -> ResidualOutput:
    torch.manual_seed(0)
    return ResidualOutput(24, tiny_model(dropout).text)


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def results(module, rows: int):
    generator = torch.Generator().manual_seed(rows)
    x, residual = (torch.randn(rows, 24, generator=generator, requires_grad=True) for _ in range(2))
    out = module(x, residual)
    return [out, *torch.autograd.grad(out.square().sum(), (x, residual, *module.parameters()))]


def test_regions_equal_eager_and_lengths_need_no_second_graph():
    eager, layers = region(), torch.nn.ModuleList([region(), region()])
    names = list(layers.state_dict())
    compile_regions(layers)
    assert list(layers.state_dict()) == names
    for rows in (7, 2, 33, 12):
        for layer in layers:
            for found, wanted in zip(results(layer, rows), results(eager, rows), strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1  # two layers, four lengths
    assert not counters["graph_break"]


def test_compiled_dropout_is_seeded():
    module = region(dropout=0.5)
    compile_regions(module)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(results(module, 9)[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_flops_of_a_compiled_region_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    totals = []
    for warm in (False, False, True):
        module = region()
        if totals:
            compile_regions(module)
        if warm:
            results(module, 9)
        x = torch.randn(9, 24, requires_grad=True)
        with FlopCounterMode(display=False) as count:
            module(x, x).sum().backward()
        totals.append(count.get_total_flops())
    assert totals[0] > 0 and totals == [totals[0]] * 3
