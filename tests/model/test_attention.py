"""All attention backends compute the same thing, on ragged runs too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.model import attention as module
from albef_ds.model.attention import attention, self_attention
from albef_ds.model.spans import PIECE, Spans
from tests.model.packed_runs import by_hand, spans_of

# Of each element, by dtype: fp32 differs by the order of sums, bf16 keeps 8 bits of operands and probabilities.
CLOSE = {torch.float32: dict(atol=1e-5, rtol=1e-4), torch.bfloat16: dict(atol=2e-2, rtol=2e-2)}
RAGGED = [1, 2, 197, 577, 25]


runs = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 13), min_size=n, max_size=n).filter(any),
        st.lists(st.integers(1, 17), min_size=n, max_size=n),
    )
)


def same_as_by_hand(out, q, k, v, q_lengths, k_lengths, causal=False):
    """The result [T, H, d] and its gradients."""
    expected = by_hand(q, k, v, q_lengths, k_lengths, causal)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, atol=5e-6, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(runs=runs, backend=st.sampled_from(["sdpa", "eager"]), seed=st.integers(0, 99))
def test_packed_attention_equals_the_definition(runs, backend, seed):
    q_lengths, k_lengths = runs
    torch.manual_seed(seed)
    q = torch.randn(sum(q_lengths), 2, 8, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), 2, 8, requires_grad=True) for _ in range(2))
    out = attention(q, k, v, spans_of(q_lengths), spans_of(k_lengths), backend=backend)
    same_as_by_hand(out, q, k, v, q_lengths, k_lengths)


@settings(max_examples=40, deadline=None)
@given(runs=runs, piece=st.sampled_from([1, 2, 5, PIECE]), backend=st.sampled_from(["sdpa", "eager"]))
def test_runs_of_which_the_host_knows_a_far_bound_alone(runs, piece, backend):
    """As on a GPU, where nobody asks how many texts look at an image: pieces in place of padding to the bound."""
    q_lengths, k_lengths = runs
    torch.manual_seed(0)
    q = torch.randn(sum(q_lengths), 2, 8, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths), 2, 8, requires_grad=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("albef_ds.model.spans.PIECE", piece)
        spans = spans_of(q_lengths, bound=5000)
        assert spans.cutting_pays
        pieces, run = spans.pieces
        lengths = [(run[i].item(), n) for i, n in enumerate(pieces.lengths.tolist()) if n]
        assert all(n <= piece for _, n in lengths) and pieces.cu_seqlens[-1] == sum(q_lengths)
        assert [sum(n for of, n in lengths if of == i) for i in range(len(q_lengths))] == q_lengths
        out = attention(q, k, v, spans, spans_of(k_lengths), backend=backend)
    same_as_by_hand(out, q, k, v, q_lengths, k_lengths)


def test_cutting_is_for_bounds_far_above_the_lengths():
    assert not spans_of([30, 90, 60]).cutting_pays
    assert not Spans.equal(3, 577, "cpu").cutting_pays
    images, tokens = 64, 64 * 67  # a fusion pass of 64 captions: all that the host knows of the texts of an image
    assert Spans(torch.zeros(images + 1, dtype=torch.int32), tokens, tokens).cutting_pays


def test_short_runs_are_taken_together_and_kept_apart():
    """What keeps them apart is made once, for all layers, and anew for other keys and for causal attention."""
    torch.manual_seed(0)
    q_lengths, others = [3, 0, 5, 1, 8, 2, 4], ([2, 6, 1, 8, 3, 3, 5], [8, 1, 1, 1, 8, 1, 1])
    q_spans = spans_of(q_lengths)
    assert module.SHORT // max(*q_lengths, *others[0], *others[1]) > 1
    q = torch.randn(sum(q_lengths), 2, 8)
    cases = [(spans_of(k_lengths), k_lengths, False) for k_lengths in others]
    cases += [(q_spans, q_lengths, causal) for causal in (True, False)]
    for layer in range(2):
        for k_spans, k_lengths, causal in cases:
            k, v = (torch.randn(sum(k_lengths), 2, 8) for _ in range(2))
            out = attention(q, k, v, q_spans, k_spans, backend="eager", causal=causal)
            expected = by_hand(q, k, v, q_lengths, k_lengths, causal)
            torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
        assert len(q_spans.beside) == len(cases), layer


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[1], [1, 2, 3, 4, 5, 6, 7], [5, 0, 1, 5], [4, 4], [197, 2, 1]])
def test_causal_attention_sees_no_later_row(lengths, backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, requires_grad=True) for _ in range(3))
    spans = spans_of(lengths)
    out = attention(q, k, v, spans, spans_of(lengths), backend=backend, causal=True)
    same_as_by_hand(out, q, k, v, lengths, lengths, causal=True)


@pytest.mark.parametrize("k_lengths", [[3, 3], [2, 4], [4, 2, 1]])
def test_causal_attention_to_other_runs_is_refused(k_lengths):
    q, k = torch.randn(6, 1, 8), torch.randn(sum(k_lengths), 1, 8)
    with pytest.raises(ValueError, match="runs"):
        attention(q, k, k, spans_of([4, 2]), spans_of(k_lengths), causal=True)


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


def same_mask_both_ways(backend, device, dtype, bound=None):
    """What was dropped out forward must be so backward: the result is linear in the values, and so is what is seen of
    the gradient with respect to them."""
    torch.manual_seed(0)
    q_spans, k_spans = spans_on(device, RAGGED, bound), spans_on(device, [577, 3, 1, 197, 30])
    q = torch.randn(q_spans.num_rows, 2, 64, device=device, dtype=dtype, requires_grad=True)
    k = torch.randn(k_spans.num_rows, 2, 64, device=device, dtype=dtype, requires_grad=True)
    v = torch.rand(k_spans.num_rows, 2, 64, device=device, dtype=dtype, requires_grad=True)
    for spans, keys, values in ((k_spans, k, v), (q_spans, k, v)):
        queries = k if spans is k_spans else q
        out = attention(queries, keys, values, spans, k_spans, 0.3, backend)
        weight = torch.randn_like(out)
        (gradient,) = torch.autograd.grad((out * weight).sum(), values)
        seen = torch.stack([(out.double() * weight.double()).sum(), (gradient.double() * values.double()).sum()])
        noise = (out.double() * weight.double()).norm().item()
        assert seen[0].item() == pytest.approx(seen[1].item(), abs=(1e-4 if dtype == torch.float32 else 0.05) * noise)
        assert not torch.equal(out, attention(queries, keys, values, spans, k_spans, 0.3, backend))


@pytest.mark.parametrize("bound", [None, 5000])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_dropout_hides_the_same_both_ways(backend, bound):
    same_mask_both_ways(backend, "cpu", torch.float32, bound)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bound", [None, 5000])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("backend", ["flash", "varlen", "efficient", "sdpa", "eager"])
def test_on_a_gpu_dropout_hides_the_same_both_ways(backend, dtype, bound):
    if why := module.obstacle(backend, "cuda", dtype, 64):
        pytest.skip(f"{backend} {why}")
    same_mask_both_ways(backend, "cuda", dtype, bound)


def test_the_memory_efficient_kernel_is_given_packed_rows_without_dropout_alone():
    assert module.reads_packed("efficient", dropout=False) and not module.reads_packed("efficient", dropout=True)
    assert module.reads_packed("flash", dropout=True) and not module.reads_packed("sdpa", dropout=False)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_self_attention_of_what_was_projected_in_one_piece(backend):
    qkv, spans = torch.randn(12, 3, 2, 8), spans_of([3, 4, 5])
    torch.testing.assert_close(
        self_attention(qkv, spans, backend=backend), attention(*qkv.unbind(1), spans, spans, backend=backend)
    )


def spans_on(device, lengths, bound=None) -> Spans:
    spans = spans_of(lengths, bound)
    return Spans(spans.cu_seqlens.to(device), spans.max_length, spans.num_rows)


def with_gradients(backend, lengths, device, dtype, causal=False, k_lengths=None, bound=None):
    """Output and gradients of one backend, fp32, on the CPU; the same operands for every backend."""
    generator = torch.Generator().manual_seed(0)
    k_lengths = k_lengths or lengths
    shapes = [(sum(n), 2, 64) for n in (lengths, k_lengths, k_lengths)]
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes)
    weight = torch.randn(shapes[0], generator=generator).to(device, dtype)
    spans = (spans_on(device, lengths, bound), spans_on(device, k_lengths))
    out = attention(q, k, v, *spans, backend=backend, causal=causal)
    return [t.float().cpu() for t in (out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v)))]


def same(backend, device, dtype, **options):
    for found, wanted in zip(
        with_gradients(backend, RAGGED, device, dtype, **options),
        with_gradients("eager", RAGGED, device, dtype, **options),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, **CLOSE[dtype])


CASES = [dict(causal=False), dict(causal=True), dict(k_lengths=[577, 3, 1, 197, 30])]


@pytest.mark.parametrize("case", CASES, ids=["self", "causal", "cross"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_on_the_cpu_sdpa_equals_eager(dtype, case):
    same("sdpa", "cpu", dtype, **case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=["self", "causal", "cross"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("backend", ["flash", "varlen", "efficient", "sdpa"])
def test_on_a_gpu_every_backend_equals_eager(backend, dtype, case):
    if why := module.obstacle(backend, "cuda", dtype, 64):
        pytest.skip(f"{backend} {why}")
    same(backend, "cuda", dtype, **case)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("backend", ["flash", "varlen", "efficient", "sdpa", "eager"])
def test_on_a_gpu_far_bounds_and_one_piece_change_nothing(backend, dtype):
    if why := module.obstacle(backend, "cuda", dtype, 64):
        pytest.skip(f"{backend} {why}")
    k_lengths = [577, 3, 1, 197, 30]
    exact = with_gradients("eager", RAGGED, "cuda", dtype, k_lengths=k_lengths)
    for found, wanted in zip(
        with_gradients(backend, RAGGED, "cuda", dtype, k_lengths=k_lengths, bound=5000), exact, strict=True
    ):
        torch.testing.assert_close(found, wanted, **CLOSE[dtype])
    qkv = torch.randn(802, 3, 2, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight, spans = torch.randn(802, 2, 64, device="cuda", dtype=dtype), spans_on("cuda", RAGGED)
    results = []
    for name in (backend, "eager"):
        out = self_attention(qkv, spans, backend=name)
        results.append((out.detach(), *torch.autograd.grad((out * weight).sum(), qkv)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE[dtype])


def test_differing_numbers_of_runs_are_refused():
    q = torch.randn(4, 1, 8)
    with pytest.raises(ValueError, match="as many query runs as key runs, got 2 and 1"):
        attention(q, q, q, spans_of([2, 2]), spans_of([4]))
