"""Both kernels as operators of torch: opcheck, FakeTensor, torch.compile, and refusals in plain words."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from albef_ds.kernels import queue_contrastive_loss, sample_hard_negatives
from tests.kernels.cases import Case, make

SMALL = Case(5, 12, 24, 0.07, 0.4, True)


def arguments(device, with_grad=True, dtype=torch.float32):
    problem = make(SMALL, dtype, device)
    tensors = [x.requires_grad_(i < 2 and with_grad) for i, x in enumerate(problem.tensors)]
    temperature = problem.temperature.requires_grad_(with_grad)
    return [*tensors, temperature, torch.tensor(0.4, device=device), problem.ids, problem.queue_ids]


@pytest.mark.parametrize("with_grad", (True, False))
def test_opcheck_of_the_loss(impl, device, with_grad):
    torch.library.opcheck(
        torch.ops.albef_ds.queue_contrastive.default, (*arguments(device, with_grad), with_grad, impl)
    )


def test_opcheck_of_the_sampler(impl, device):
    logits, noise = torch.randn(6, 6, device=device), torch.rand(6, 6, device=device)
    for ids in (None, torch.arange(6, device=device) // 2):
        torch.library.opcheck(torch.ops.albef_ds.hard_negatives.default, (logits, noise, ids, impl))


def test_shapes_without_data(impl):
    with FakeTensorMode():
        tensors = [torch.empty(64, 256, requires_grad=i < 2) for i in range(4)] + [torch.empty(65536, 256)] * 2
        loss, i2t, t2i = queue_contrastive_loss(*tensors, torch.full((1,), 0.07), 0.4, impl=impl)
        assert loss.shape == () and i2t.shape == t2i.shape == (64, 64) and loss.requires_grad
        assert sample_hard_negatives(i2t, impl=impl).shape == (64,)


def test_torch_compile_takes_a_step_in_one_graph(impl, device):
    def step(image, text, image_m, text_m, image_queue, text_queue, temperature, alpha, ids, queue_ids):
        scaled = torch.nn.functional.normalize(image * 2, dim=-1)
        loss, i2t, _ = queue_contrastive_loss(
            scaled, text, image_m, text_m, image_queue, text_queue, temperature, alpha, ids, queue_ids, impl=impl
        )
        return loss * 2, sample_hard_negatives(i2t, ids, impl=impl)

    plain, compiled = arguments(device), arguments(device)
    expected, _ = step(*plain)
    expected.backward()
    loss, negatives = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(plain[:2] + plain[6:7], compiled[:2] + compiled[6:7], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert negatives.shape == (5,) and negatives.max() < 5


WRONG = {
    "text_feat has shape [5, 23]": lambda a: a.__setitem__(1, a[1][:, 1:]),
    "text_queue has shape [11, 24], expected [12, 24]": lambda a: a.__setitem__(5, a[5][1:]),
    "image_feat must be [B, D]": lambda a: a.__setitem__(0, a[0][0]),
    "ids has shape [4], expected [5]": lambda a: a.__setitem__(8, a[8][1:]),
    "queue_ids was given without ids": lambda a: a.__setitem__(8, None),
    "queue_ids must be int64, got torch.int32": lambda a: a.__setitem__(9, a[9].int()),
    "image_feat must be one of": lambda a: a.__setitem__(0, a[0].int()),
    "the queues differ in dtype": lambda a: a.__setitem__(4, a[4].bfloat16()),
    "temperature must hold one element": lambda a: a.__setitem__(6, a[6].repeat(2)),
    "alpha must be a number": lambda a: a.__setitem__(7, a[7].repeat(2)),
    "image_queue is on meta": lambda a: a.__setitem__(4, a[4].to("meta")),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message, device):
    given = arguments(device, with_grad=False)
    WRONG[message](given)
    with pytest.raises((ValueError, TypeError)) as caught:
        queue_contrastive_loss(*given)
    assert message in str(caught.value)


def test_unknown_implementations_and_unreachable_ones(device, triton_runs):
    given = arguments(device, with_grad=False)
    with pytest.raises(ValueError, match="impl must be one of"):
        queue_contrastive_loss(*given, impl="cuda")
    wide = [torch.zeros(2, 513, device=device)] * 4 + [torch.zeros(3, 513, device=device)] * 2
    with pytest.raises(ValueError, match="D <= 512, got 513"):
        queue_contrastive_loss(*wide, given[6], 0.4, impl="triton")
    double = [x.double() if x.is_floating_point() else x for x in given]
    with pytest.raises(ValueError, match="fp16, bf16 or fp32"):
        queue_contrastive_loss(*double, impl="triton")


def test_triton_without_a_gpu_says_what_to_do(monkeypatch):
    from albef_ds.kernels import launch

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        sample_hard_negatives(torch.zeros(3, 3), impl="triton")
