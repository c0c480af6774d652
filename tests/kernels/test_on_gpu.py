"""What only a GPU can show: no waiting for the host, little memory, queues beyond 2^31 elements."""

import pytest
import torch

from albef_ds.kernels import oracle, queue_contrastive_loss, sample_hard_negatives
from tests.kernels.cases import Case, make, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PAPER = dict(batch=64, length=65536, dim=256, temperature=0.07, alpha=0.4)


@pytest.mark.parametrize("with_ids", (False, True))
def test_no_call_waits_for_the_gpu(with_ids, device):
    problem = make(Case(16, 1000, 256, 0.07, 0.4, with_ids), torch.bfloat16, device)

    def step():
        loss, i2t, t2i, *gradients = problem.run(queue_contrastive_loss, impl="triton")
        sample_hard_negatives(i2t, problem.ids, impl="triton")
        sample_hard_negatives(t2i, problem.ids, impl="triton")

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def added_bytes(problem, **options):
    """Peak memory of forward and backward above the inputs and their copies."""
    tensors = [x.detach().requires_grad_(i < 2) for i, x in enumerate(problem.tensors)]
    temperature = problem.temperature.clone().requires_grad_()
    function = options.pop("function", queue_contrastive_loss)

    def step():
        function(*tensors, temperature, problem.alpha, **options)[0].backward()
        for x in (*tensors[:2], temperature):
            x.grad = None

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_under_16_megabytes_where_eager_code_takes_hundreds(device):
    half = make(Case(**PAPER, with_ids=False), torch.bfloat16, device)
    assert added_bytes(half, impl="triton") < 16 * 2**20
    full = make(Case(**PAPER, with_ids=False), torch.float32, device)
    assert added_bytes(full, function=oracle.queue_contrastive_loss, dtype=None) > 300 * 2**20


def test_a_queue_of_more_than_2_to_31_elements(device):
    """Only the last rows are not zero: 32-bit offsets would never see them, or crash."""
    dim, length = 256, 2**31 // 256 + 1000
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    problem = make(Case(4, 64, dim, 0.07, 0.4, False), torch.bfloat16, device)
    long = [torch.zeros(length, dim, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for queue, short in zip(long, problem.tensors[4:], strict=True):
        queue[-64:] = short
    tail = [x.double() for x in problem.tensors]
    problem.tensors[4:] = long
    got = problem.run(queue_contrastive_loss, impl="triton")
    # The zero rows add (length - 64) logits of 0 to both softmaxes; fold them into one logit of log(length - 64).
    image, text = (x.requires_grad_() for x in tail[:2])
    losses = []
    for feat, feat_m, bank in ((image, tail[2], (tail[3], tail[5])), (text, tail[3], (tail[2], tail[4]))):
        extra = torch.full((4, 1), float(length - 64), device=device, dtype=torch.float64).log()
        bank = torch.cat(bank)
        soft = torch.softmax(torch.cat([feat_m @ bank.T / 0.07, extra], 1), 1)
        target = 0.4 * soft + 0.6 * torch.eye(*soft.shape, device=device)
        logits = torch.cat([feat @ bank.T / 0.07, extra], 1)
        log_p = logits - torch.logsumexp(logits, 1, keepdim=True)
        # Each zero row has its own logit of 0, not the folded one.
        log_p = torch.cat([log_p[:, :-1], log_p[:, -1:] - extra], 1)
        losses.append(-(target * log_p).sum(1).mean())
    loss = sum(losses) / 2
    loss.backward()
    assert abs(got[0] - loss) < 1e-4
    assert relative(got[3], image.grad) < 5e-3 and relative(got[4], text.grad) < 5e-3
