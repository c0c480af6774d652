"""Who is timed in `benchmarks.kernels`: our kernels, plain code, and public kernels if they are installed.

Each contender is a function of a `Problem` that returns a call without arguments: one forward, with gradients wanted
also one backward. Public kernels compute less than the loss (hard labels, no teacher); their rows say so.
"""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from albef_ds.kernels import oracle, queue_contrastive_loss, sample_hard_negatives


@dataclass
class Problem:
    """Random unit features of one shape; `image_feat`, `text_feat` and `temperature` want gradients."""

    batch: int
    length: int
    dim: int
    device: torch.device

    def __post_init__(self):
        generator = torch.Generator(self.device).manual_seed(0)

        def unit(rows):
            x = torch.randn(rows, self.dim, device=self.device, generator=generator)
            return F.normalize(x, dim=-1)

        self.tensors = [unit(self.batch) for _ in range(4)] + [unit(self.length) for _ in range(2)]
        self.temperature = torch.full((1,), 0.07, device=self.device)

    def leaves(self, dtype, with_grad):
        """The arguments of the loss up to alpha, in `dtype`."""
        tensors = [x.detach().to(dtype).requires_grad_(with_grad and i < 2) for i, x in enumerate(self.tensors)]
        return [*tensors, self.temperature.clone().requires_grad_(with_grad), 0.4]


def _call(function, arguments, with_grad):
    def call():
        loss = function(*arguments)
        if with_grad:
            loss.backward()
            for x in arguments:
                if isinstance(x, torch.Tensor):
                    x.grad = None
        return loss

    def forward():
        with torch.no_grad():
            return call()

    return call if with_grad else forward


def ours(impl, dtype):
    """Our loss, by implementation and dtype of features and queues."""

    def build(problem, with_grad):
        return _call(lambda *x: queue_contrastive_loss(*x, impl=impl)[0], problem.leaves(dtype, with_grad), with_grad)

    return build


def eager(dtype, backend=None):
    """The textbook formulation: bank concatenated, logits held, autograd; with a `backend`, through torch.compile."""

    def loss(*arguments):
        return oracle.queue_contrastive_loss(*arguments, dtype=None)[0]

    def build(problem, with_grad):
        function = loss
        if backend is not None:
            # After eight shapes of one function PyTorch compiles no more of it and runs it eagerly, without an error.
            torch._dynamo.reset()
            function = torch.compile(loss, dynamic=False, backend=backend)
        return _call(function, problem.leaves(dtype, with_grad), with_grad)

    return build


def inf_cl(problem, with_grad):
    """Inf-CL's flash loss over the same bank, both directions; hard labels only, bank concatenated by us beforehand."""
    from inf_cl import cal_flash_loss

    image, text, image_m, text_m, image_queue, text_queue, *_ = problem.leaves(torch.bfloat16, with_grad)
    banks = torch.cat([text_m, text_queue]), torch.cat([image_m, image_queue])

    def loss(image, text):
        pairs = zip((image, text), banks, strict=True)
        return sum(cal_flash_loss(x, bank, scale=1 / 0.07, head_dim=problem.dim).mean() for x, bank in pairs) / 2

    return _call(loss, [image, text], with_grad)


def liger(problem, with_grad):
    """Liger's fused linear cross entropy with the bank as its vocabulary, both directions; hard labels only."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    image, text, image_m, text_m, image_queue, text_queue, *_ = problem.leaves(torch.bfloat16, with_grad)
    banks = torch.cat([text_m, text_queue]), torch.cat([image_m, image_queue])
    labels, entropy = torch.arange(problem.batch, device=problem.device), LigerFusedLinearCrossEntropyLoss()

    def loss(image, text):
        pairs = zip((image, text), banks, strict=True)
        return sum(entropy(bank, x / 0.07, labels) for x, bank in pairs) / 2

    return _call(loss, [image, text], with_grad)


def installed(module: str) -> bool:
    """Whether a public package is there to be timed."""
    return importlib.util.find_spec(module) is not None


def losses(device: torch.device) -> dict:
    """{name: build(problem, with_grad)} of all that can be timed on `device`, the eager fp32 formulation first."""
    if device.type == "cpu":
        return {"eager fp32": eager(torch.float32), "ours torch fp32": ours("torch", torch.float32)}
    found = {
        "eager fp32": eager(torch.float32),
        "eager bf16": eager(torch.bfloat16),
        "torch.compile bf16": eager(torch.bfloat16, backend="inductor"),
        "ours torch bf16": ours("torch", torch.bfloat16),
        "ours triton bf16": ours("triton", torch.bfloat16),
        "ours triton fp32": ours("triton", torch.float32),
    }
    if installed("inf_cl"):
        found["Inf-CL bf16 (hard labels)"] = inf_cl
    if installed("liger_kernel"):
        found["Liger bf16 (hard labels)"] = liger
    return found


def samplers(logits: torch.Tensor) -> dict:
    """{name: call} for one direction of hard negatives from logits [B, B], the loop first."""
    calls = {"ours torch": lambda: sample_hard_negatives(logits, impl="torch")}
    if logits.is_cuda:
        calls["ours triton"] = lambda: sample_hard_negatives(logits, impl="triton")
    if logits.shape[0] == 1:  # without a negative the loop's `multinomial` fails, which on a GPU ends CUDA for good
        return calls
    return {"loop of multinomial().item()": lambda: oracle.sample_hard_negatives_loop(logits)} | calls
