"""The sampler: its law, its reproducibility and the rows on which `torch.multinomial` gives up."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from albef_ds.kernels import oracle, sample_hard_negatives
from tests.kernels.cases import NO_SHRINKING


def draw(logits, ids, count, impl, generator):
    """[count, B] draws; the rows of one large block-diagonal problem would cost more than repeating."""
    return torch.stack([sample_hard_negatives(logits, ids, generator, impl) for _ in range(count)])


@pytest.mark.parametrize("with_ids", (False, True))
def test_the_law_is_softmax_over_the_valid_candidates(with_ids, impl, device):
    """Chi-square over all rows. The interpreter draws few; the next test ties it to the PyTorch form."""
    generator = torch.Generator(device).manual_seed(5)
    batch, count = 8, 20_000 if impl == "torch" or device.type == "cuda" else 250
    logits = torch.randn(batch, batch, generator=torch.Generator().manual_seed(1)).to(device)
    ids = torch.arange(batch, device=device) // 2 if with_ids else None
    expected = oracle.hard_negative_probabilities(logits, ids).cpu()
    draws = draw(logits, ids, count, impl, generator).cpu()
    observed = torch.stack([torch.bincount(column, minlength=batch) for column in draws.T])
    valid = expected > 0
    assert observed[~valid].sum() == 0
    chi_square = ((observed - count * expected) ** 2 / (count * expected))[valid].sum().item()
    freedom = int(valid.sum()) - batch
    assert stats.chi2.sf(chi_square, freedom) > 1e-4
    # The same statistic against a law that is off: the test can tell.
    other = oracle.hard_negative_probabilities(logits * 2, ids).cpu()
    off = ((observed - count * other) ** 2 / (count * other))[valid].sum().item()
    assert stats.chi2.sf(off, freedom) < 1e-6


def test_both_implementations_draw_the_same(device, triton_runs):
    for batch in (1, 2, 17, 64, 1030):
        logits = torch.randn(batch, batch, device=device) * 5
        for ids in (None, torch.randint(0, max(1, batch // 3), (batch,), device=device)):
            draws = []
            for impl in ("torch", "triton"):
                generator = torch.Generator(device).manual_seed(7)
                draws.append(sample_hard_negatives(logits, ids, generator, impl))
            if device.type == "cpu":
                assert torch.equal(*draws)
            else:  # the two logarithms may differ in the last bit and turn a tie
                assert (draws[0] != draws[1]).sum() <= 1
        if batch == 1030 and device.type == "cpu":
            break


def test_reproducible_from_a_generator_or_the_default_one(impl, device):
    logits = torch.randn(32, 32, device=device)
    generator = torch.Generator(device)
    first = sample_hard_negatives(logits, generator=generator.manual_seed(1), impl=impl)
    assert torch.equal(first, sample_hard_negatives(logits, generator=generator.manual_seed(1), impl=impl))
    assert not torch.equal(first, sample_hard_negatives(logits, generator=generator.manual_seed(2), impl=impl))
    torch.manual_seed(4)
    first = sample_hard_negatives(logits, impl=impl)
    assert not torch.equal(first, sample_hard_negatives(logits, impl=impl))
    torch.manual_seed(4)
    assert torch.equal(first, sample_hard_negatives(logits, impl=impl))


LOOP = """
import sys, torch
from albef_ds.kernels import oracle
try:
    oracle.sample_hard_negatives_loop(torch.eye(16, device=sys.argv[1]) * 1e4)
except RuntimeError:
    print("raised", flush=True)
"""


def test_the_usual_loop_fails_where_all_mass_is_on_the_positive(device):
    """softmax underflows to 0 beside the diagonal, and `multinomial` has nothing to draw."""
    if device.type == "cpu":
        with pytest.raises(RuntimeError):
            oracle.sample_hard_negatives_loop(torch.eye(16) * 1e4)
    else:  # a failed assertion on the device, after which CUDA fails for the whole process: hence one of its own
        command = [sys.executable, "-c", LOOP, str(device)]
        assert subprocess.run(command, capture_output=True, text=True, timeout=300).stdout == "raised\n"


def test_all_mass_on_the_positive_is_nothing_special(impl, device):
    """A valid negative is drawn as ever."""
    logits = torch.eye(16, device=device) * 1e4
    negatives = sample_hard_negatives(logits, impl=impl)
    assert ((negatives >= 0) & (negatives != torch.arange(16, device=device))).all()


@settings(max_examples=40, deadline=None, phases=NO_SHRINKING, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 40),
    groups=st.integers(1, 8),
    scale=st.sampled_from((0.0, 1.0, 1e3, 1e30)),
    bad=st.sampled_from((None, float("nan"), float("-inf"), float("inf"))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    seed=st.integers(0, 99),
)
def test_never_itself_never_its_id_never_an_impossible_one(batch, groups, scale, bad, dtype, seed, impl, device):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, batch, generator=generator) * scale).to(dtype)
    if bad is not None:
        logits[torch.rand(batch, batch, generator=generator) < 0.5] = bad
    ids = torch.randint(0, groups, (batch,), generator=generator)
    negatives = sample_hard_negatives(logits.to(device), ids.to(device), impl=impl).cpu()
    possible = (ids[:, None] != ids[None, :]) & ~logits.isnan() & (logits > float("-inf"))
    for row, negative in enumerate(negatives.tolist()):
        assert possible[row, negative] if possible[row].any() else negative == -1


def test_a_batch_without_negatives_gives_minus_one(impl, device):
    assert sample_hard_negatives(torch.zeros(1, 1, device=device), impl=impl).tolist() == [-1]
    same = torch.zeros(4, dtype=torch.int64, device=device)
    assert sample_hard_negatives(torch.zeros(4, 4, device=device), same, impl=impl).tolist() == [-1] * 4


def test_transposed_logits(impl, device):
    logits = torch.randn(20, 20, device=device)
    draws = []
    for x in (logits.t(), logits.t().contiguous()):
        draws.append(sample_hard_negatives(x, generator=torch.Generator(device).manual_seed(2), impl=impl))
    assert torch.equal(*draws)


def test_what_does_not_fit_is_named(device):
    with pytest.raises(ValueError, match=r"logits must be \[B, B\].*got shape \[2, 3\]"):
        sample_hard_negatives(torch.zeros(2, 3, device=device))
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        sample_hard_negatives(torch.zeros(2, 2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"ids has shape \[3\], expected \[2\]"):
        sample_hard_negatives(torch.zeros(2, 2, device=device), torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match="ids must be int64"):
        sample_hard_negatives(torch.zeros(2, 2, device=device), torch.zeros(2, device=device))
    with pytest.raises(ValueError, match="impl must be one of"):
        sample_hard_negatives(torch.zeros(2, 2, device=device), impl="fast")
