"""The queue-contrastive loss against the fp64 oracle, and all that it promises besides the right numbers."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albef_ds.kernels import launch, oracle, queue_contrastive_loss
from albef_ds.kernels import queue_contrastive as module
from albef_ds.kernels.launch import Plan, Tile
from tests.kernels.cases import GRID, NO_SHRINKING, Case, check, full_grid, make, pairwise, relative

PAIRS = pairwise()
SMALL = Case(16, 64, 24, 0.07, 0.4, False)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def named(cases):
    return [pytest.param(case, id=case.name) for case in cases]


def in_parts(test):
    """Cuts a test of the whole grid into twelve of equal work, which several processes can share (`pytest -n`)."""
    for name in ("temperature", "alpha"):
        test = pytest.mark.parametrize(name, GRID[name], ids=lambda value, name=name: f"{name[0]}{value}")(test)
    return test


def part(temperature, alpha):
    return [case for case in full_grid() if (case.temperature, case.alpha) == (temperature, alpha)]


@in_parts
def test_torch_form_holds_on_the_whole_grid(temperature, alpha, device):
    """All 1,152 points, fp32; the Triton kernels' turn on the whole grid is `python -m tests.kernels.cases`."""
    for case in part(temperature, alpha):
        check(make(case, torch.float32, device), "torch")


@pytest.mark.parametrize("case", named(PAIRS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_holds_on_pairs_of_parameters(case, dtype, device, triton_runs):
    check(make(case, dtype, device), "triton")


@pytest.mark.parametrize("case", named(PAIRS))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_torch_form_holds_in_half_precision(case, dtype, device):
    check(make(case, dtype, device), "torch")


@pytest.mark.skipif(
    not (torch.cuda.is_available() or os.environ.get("ALBEF_DS_FULL_GRID")), reason="long; set ALBEF_DS_FULL_GRID=1"
)
@pytest.mark.timeout(6 * 3600)
@in_parts
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_triton_holds_on_the_whole_grid(temperature, alpha, dtype, device, triton_runs):
    for case in part(temperature, alpha):
        check(make(case, dtype, device), "triton")


@pytest.mark.parametrize("arch", (80, 86, 90))
@pytest.mark.parametrize("with_ids", (False, True))
@pytest.mark.parametrize("dtype,dim", [(torch.bfloat16, 256), (torch.bfloat16, 512), (torch.float32, 100)], ids=str)
def test_the_default_tiles_of_each_chip_compute_the_same(arch, with_ids, dtype, dim, device, triton_runs):
    """The interpreter has tiles of its own; here it runs those that the chips get, several splits, ragged ends."""
    if device.type == "cuda" and launch.SHARED_MEMORY[arch] > launch.shared_memory(device):
        pytest.skip("this chip has less shared memory")
    launch.force((), Plan(*launch.default_tiles(arch, dtype, 35, dim, with_ids), splits=3))
    check(make(Case(35, 150, dim, 0.01, 0.4, with_ids), dtype, device), "triton")


@pytest.mark.parametrize("splits", (1, 2, 7, 40))
def test_any_number_of_splits_gives_the_same_loss(splits, device, triton_runs):
    """More splits than tiles leave some without work."""
    launch.force((), Plan(Tile(16, 16), Tile(32, 16), splits))
    check(make(SMALL, torch.float32, device), "triton")


@pytest.mark.parametrize("with_ids", (False, True), ids=("rows", "ids"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@settings(max_examples=6, deadline=None, phases=NO_SHRINKING, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 40),
    length=st.integers(0, 90),
    dim=st.integers(1, 80),
    temperature=st.floats(0.001, 0.5),
    alpha=st.floats(0, 1),
)
def test_any_shape(batch, length, dim, temperature, alpha, with_ids, dtype, impl, device):
    """Including no queue at all, and a single feature, where the gradient of a unit vector cancels to nothing."""
    case = Case(batch, length, dim, temperature, alpha, with_ids)
    problem = make(case, dtype, device)
    loss, i2t, t2i, *gradients = problem.run(queue_contrastive_loss, impl=impl)
    truth = problem.run(oracle.queue_contrastive_loss, exact=True)
    assert abs(loss.item() - truth[0].item()) <= 1e-4 * max(1.0, truth[0].abs().item())
    assert relative(i2t, truth[1]) < 1e-5 and relative(t2i, truth[2]) < 1e-5
    slack = 5e-3 if dtype == torch.bfloat16 else 3e-4
    scale = 1 / (2 * batch**0.5 * temperature)  # of either direction's terms, which may cancel
    for ours, theirs in zip(gradients[:2], truth[3:5], strict=True):
        assert (ours.double() - theirs).norm() <= slack * max(theirs.norm().item(), scale)


def test_gradcheck_of_the_torch_form():
    """Against finite differences in fp64. Temperature at alpha 0 alone: else the teacher's targets move with it."""
    for with_ids in (False, True):
        for alpha in (0.0, 0.4):
            problem = make(Case(4, 6, 5, 0.2, alpha, with_ids), torch.float64)
            image, text, *rest = (x.requires_grad_(i < 2) for i, x in enumerate(problem.tensors))
            temperature = problem.temperature.double().requires_grad_(alpha == 0)

            def loss(image, text, temperature, rest=rest, p=problem):
                return queue_contrastive_loss(image, text, *rest, temperature, p.alpha, p.ids, p.queue_ids)[0]

            assert torch.autograd.gradcheck(loss, (image, text, temperature))


def test_same_bits_twice(impl, device):
    for with_ids in (False, True):
        problem = make(replace(SMALL, length=300, with_ids=with_ids), torch.bfloat16, device)
        first, second = (problem.run(queue_contrastive_loss, impl=impl) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_queue_may_be_overwritten_before_backward(impl, device):
    problem = make(SMALL, torch.float32, device)
    expected = problem.run(queue_contrastive_loss, impl=impl)[3]
    image, *rest = (x.clone() for x in problem.tensors)
    image.requires_grad_()
    loss, _, _ = queue_contrastive_loss(image, *rest, problem.temperature, problem.alpha, impl=impl)
    for x in rest:
        x.fill_(float("nan"))
    loss.backward()
    assert torch.equal(image.grad, expected)


def test_without_gradients_the_loss_is_the_same_and_the_second_pass_is_left_out(impl, device, monkeypatch):
    problem = make(SMALL, torch.float32, device)
    with_gradients = problem.run(queue_contrastive_loss, impl=impl)
    asked, op = [], module._op
    monkeypatch.setattr(module, "_op", lambda *arguments: asked.append(arguments[10]) or op(*arguments))
    with torch.no_grad():
        loss, i2t, t2i = queue_contrastive_loss(*problem.tensors, problem.temperature, 0.4, impl=impl)
    assert asked == [False] and not loss.requires_grad
    assert torch.equal(loss, with_gradients[0])
    assert torch.equal(i2t, with_gradients[1]) and torch.equal(t2i, with_gradients[2])


def test_backward_scales_by_what_comes_from_above(impl, device):
    problem = make(SMALL, torch.float32, device)
    once = problem.run(queue_contrastive_loss, impl=impl)
    thrice = problem.run(lambda *a: tuple(x * 3 for x in queue_contrastive_loss(*a, impl=impl)))
    for a, b in zip(once[3:], thrice[3:], strict=True):
        torch.testing.assert_close(a * 3, b)


def test_autocast_changes_nothing(impl, device):
    problem = make(SMALL, torch.float32, device)
    plain = problem.run(queue_contrastive_loss, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = problem.run(queue_contrastive_loss, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_alpha_may_be_a_tensor_and_temperature_a_scalar(impl, device):
    problem = make(SMALL, torch.float32, device)
    expected = problem.run(queue_contrastive_loss, impl=impl)
    problem.alpha = torch.tensor(problem.alpha, device=device)
    problem.temperature = problem.temperature[0]
    got = problem.run(queue_contrastive_loss, impl=impl)
    assert got[5].shape == ()
    assert all(torch.equal(a, b.reshape(a.shape)) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("features,queue", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_features_of_another_dtype_are_rounded_to_the_queues(features, queue, impl, device):
    features, queue = getattr(torch, features), getattr(torch, queue)
    problem = make(SMALL, torch.float32, device)
    problem.tensors = [x.to(features) for x in problem.tensors[:4]] + [x.to(queue) for x in problem.tensors[4:]]
    got = problem.run(queue_contrastive_loss, impl=impl)
    rounded = replace(problem, tensors=[x.to(queue) for x in problem.tensors])
    truth = rounded.run(oracle.queue_contrastive_loss, exact=True)
    assert got[3].dtype == features and got[0].dtype == torch.float32
    assert abs(got[0] - truth[0]) < 1e-5
    assert max(relative(a, b) for a, b in zip(got[3:5], truth[3:5], strict=True)) < 5e-3


def test_strided_inputs(impl, device):
    problem = make(SMALL, torch.float32, device)
    expected = problem.run(queue_contrastive_loss, impl=impl)
    problem.tensors = [x.t().contiguous().t() for x in problem.tensors]
    got = problem.run(queue_contrastive_loss, impl=impl)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)


def test_a_queue_without_ids_holds_no_positives(impl, device):
    problem = make(replace(SMALL, with_ids=True), torch.float32, device)
    problem.queue_ids = None
    check(problem, impl)


def test_three_steps_of_training_agree(device, triton_runs):
    """The whole way of a step in small: projections, loss, AdamW, queue overwritten in place; both implementations."""

    def train(impl):
        torch.manual_seed(3)
        image_proj, text_proj = (torch.nn.Linear(20, 32, device=device) for _ in range(2))
        temperature = torch.nn.Parameter(torch.full((1,), 0.07, device=device))
        optimiser = torch.optim.AdamW([*image_proj.parameters(), *text_proj.parameters(), temperature], lr=1e-2)
        queues = [F.normalize(torch.randn(24, 32, device=device), dim=-1) for _ in range(2)]
        for step in range(3):
            image, text = torch.randn(8, 20, device=device), torch.randn(8, 20, device=device)
            feats = [F.normalize(proj(x), dim=-1) for proj, x in ((image_proj, image), (text_proj, text))]
            teacher = [feat.detach() for feat in feats]
            loss, _, _ = queue_contrastive_loss(*feats, *teacher, *queues, temperature, 0.4 * step / 2, impl=impl)
            for queue, feat in zip(queues, teacher, strict=True):
                queue[step * 8 : step * 8 + 8] = feat
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return [loss.detach(), temperature.detach(), image_proj.weight.detach(), text_proj.weight.detach(), *queues]

    for a, b in zip(train("torch"), train("triton"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Altered:
    """A kernel launched with some of its arguments changed."""

    def __init__(self, kernel, **changed):
        self.kernel, self.changed = kernel, changed

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.kernel[grid](*arguments, **options | self.changed)


def test_a_planted_mistake_is_caught(device, monkeypatch, triton_runs):
    """The tolerances mean something: without the positive's share of the gradient, or with one split of the bank left
    out of the sums, nothing passes."""
    from albef_ds.kernels import queue_contrastive_kernels as kernels

    problem = make(replace(SMALL, length=256), torch.bfloat16, device)
    check(problem, "triton")
    monkeypatch.setattr(kernels, "reduce", Altered(kernels.reduce, HAS_IDS=True))
    with pytest.raises(AssertionError, match="features"):
        check(problem, "triton")
    monkeypatch.undo()
    narrow = Plan(Tile(16, 16), Tile(16, 16), 8)
    launch.force((), narrow)
    check(problem, "triton")
    monkeypatch.setattr(kernels, "combine", Altered(kernels.combine, SPLITS=8))
    with pytest.raises(AssertionError, match="loss"):
        check(problem, "triton")


def test_auto_is_triton_on_a_gpu_where_it_fits_and_torch_elsewhere(device, monkeypatch):
    asked, op = [], module._op
    monkeypatch.setattr(module, "_op", lambda *arguments: asked.append(arguments[11]) or op(*arguments))
    for dim, dtype in ((24, torch.float32), (513, torch.float32), (24, torch.float64)):
        make(replace(SMALL, dim=dim), dtype, device).run(queue_contrastive_loss)
    assert asked == (["triton", "torch", "torch"] if device.type == "cuda" else ["torch"] * 3)


@pytest.mark.parametrize("with_ids,limit", [(False, 1e-3), (True, 5e-5)])
def test_the_share_of_the_positives_is_not_rounded_to_bf16(with_ids, limit, device, triton_runs):
    """fp32 features over a bf16 queue: the gradient comes back unrounded and shows what the products lost."""
    problem = make(replace(SMALL, length=200, alpha=0.0, with_ids=with_ids), torch.bfloat16, device)
    truth = problem.run(oracle.queue_contrastive_loss, exact=True)
    problem.tensors[:4] = [x.float() for x in problem.tensors[:4]]
    got = problem.run(queue_contrastive_loss, impl="triton")
    assert max(relative(a, b) for a, b in zip(got[3:5], truth[3:5], strict=True)) < limit
