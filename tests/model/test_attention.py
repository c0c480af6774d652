"""All attention backends compute the same thing, on ragged runs too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.model.attention import Spans, attention, resolve_backend


def spans_of(lengths: list[int]) -> Spans:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Spans(cu_seqlens, max(lengths), sum(lengths))


def by_hand(q, k, v, q_lengths, k_lengths):
    """Run by run, straight from the definition, in fp64."""
    out, q0, k0 = [], 0, 0
    for nq, nk in zip(q_lengths, k_lengths, strict=True):
        qi, ki, vi = (t.double().transpose(0, 1) for t in (q[q0 : q0 + nq], k[k0 : k0 + nk], v[k0 : k0 + nk]))
        out.append(((qi @ ki.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ vi).transpose(0, 1))
        q0, k0 = q0 + nq, k0 + nk
    return torch.cat(out)


runs = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 13), min_size=n, max_size=n).filter(any),
        st.lists(st.integers(1, 17), min_size=n, max_size=n),
    )
)


@settings(max_examples=40, deadline=None)
@given(runs=runs, backend=st.sampled_from(["sdpa", "eager"]), seed=st.integers(0, 99))
def test_packed_attention_equals_the_definition(runs, backend, seed):
    q_lengths, k_lengths = runs
    torch.manual_seed(seed)
    q = torch.randn(sum(q_lengths), 2, 8, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), 2, 8, requires_grad=True) for _ in range(2))
    out = attention(q, k, v, spans_of(q_lengths), spans_of(k_lengths), backend=backend)
    expected = by_hand(q, k, v, q_lengths, k_lengths)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 65, 197, 577])
def test_regular_runs_at_image_lengths(length):
    q, k, v = (torch.randn(2 * length, 3, 16) for _ in range(3))
    spans = Spans.equal(2, length, "cpu")
    sdpa, eager = (attention(q, k, v, spans, spans, backend=b) for b in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, atol=2e-6, rtol=1e-5)


def test_bf16_stays_within_its_rounding():
    q, k, v = (torch.randn(40, 2, 8) for _ in range(3))
    spans = spans_of([7, 1, 32])
    exact = attention(q, k, v, spans, spans)
    half = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), spans, spans)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)  # bf16 keeps 8 bits; scores of size ~3


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_dropout_keeps_the_mean_and_can_be_seeded(backend):
    torch.manual_seed(0)
    q, k = torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    v = torch.ones(12, 2, 8)  # attention of ones is one; dropped out it varies around one
    spans = spans_of([12])
    torch.manual_seed(1)
    dropped = torch.stack([attention(q, k, v, spans, spans, 0.5, backend) for _ in range(400)])
    assert dropped.std() > 0.1
    assert dropped.mean() == pytest.approx(1.0, abs=0.05)
    torch.manual_seed(1)
    assert torch.equal(attention(q, k, v, spans, spans, 0.5, backend), dropped[0])


def test_unknown_and_impossible_backends_are_named():
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        resolve_backend("fast", "cpu", torch.float32)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        resolve_backend("flash", "cpu", torch.bfloat16)


def test_differing_numbers_of_runs_are_refused():
    q = torch.randn(4, 1, 8)
    with pytest.raises(ValueError, match="as many query runs as key runs, got 2 and 1"):
        attention(q, q, q, spans_of([2, 2]), spans_of([4]))
