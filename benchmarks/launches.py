"""What a step would launch on a GPU, operator by operator, with its bytes and FLOPs; nothing is computed.

    with fake_gpu.install(), LaunchCount() as count:
        step()

What PyTorch's operators launch and move is in benchmarks/cuda_operators.py, FLOPs are those of training/flops.py, and
our own kernels are counted in Triton's interpreter (benchmarks.kernel_traffic).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from albef_ds.kernels import launch
from albef_ds.training.flops import FlopCount
from benchmarks import chips, cuda_operators, kernel_traffic
from benchmarks.fake_streams import tensors_in
from benchmarks.kernel_traffic import Traffic

GROUPS = {
    "matrix products": "mm addmm bmm baddbmm convolution convolution_backward linear",
    "attention": "flash_attn::_flash_attn_varlen_forward flash_attn::_flash_attn_varlen_backward "
    "flash_attn::_flash_attn_forward flash_attn::_flash_attn_backward torch_attn::_varlen_attn "
    "torch_attn::_varlen_attn_backward _flash_attention_forward _flash_attention_backward _efficient_attention_forward "
    "_efficient_attention_backward _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_backward _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_cudnn_attention_backward",
    "LayerNorm": "native_layer_norm native_layer_norm_backward",
    "GELU": "gelu gelu_backward",
    "dropout": "native_dropout native_dropout_backward",
    "casts": "_to_copy",
    "bias gradients and other sums": "sum mean amax max min argmax argmin linalg_vector_norm any all",
    "ITC kernels": "albef_ds::queue_contrastive",
    "hard negatives": "albef_ds::hard_negatives exponential_ multinomial",
    "softmax and losses": "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data nll_loss_forward "
    "nll_loss_backward",
    "gathers, scatters, concatenations": "index_select index index_copy index_copy_ index_add index_add_ cat stack "
    "embedding embedding_dense_backward gather scatter scatter_ scatter_add scatter_add_ index_put index_put_ "
    "_unsafe_index_put _index_put_impl_ sort topk cumsum searchsorted constant_pad_nd repeat slice_backward "
    "select_backward slice_scatter",
}
ELEMENTWISE = "adds and other elementwise"
PHASE_GROUPS = ("teacher", "optimiser", "queue")  # phases that are groups of their own, whatever operators they take
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


@dataclass
class Work:
    """Sums over operators."""

    operators: int = 0  # dispatched, views among them
    launches: int = 0
    bytes: int = 0  # read and written
    flops: int = 0
    bf16_flops: int = 0  # that would take as long as these in their own precision

    def __iadd__(self, other: Work) -> Work:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class LaunchCount(TorchDispatchMode):
    """Counts the work on the GPU by phase and operator; to be entered inside of the fake GPU's mode.

    Attributes:
        work: {(phase, operator): Work}; operators of other namespaces than aten have theirs before the name.
        kernels: what our own kernels asked memory for, and launched.
    """

    def __init__(self):
        super().__init__()
        self.work: dict[tuple[str, str], Work] = defaultdict(Work)
        self.kernels = Traffic()
        self._phase = "?"
        self._flops = FlopCount().flop_registry

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what is dispatched inside under that name; an inner phase's is not the outer one's."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def groups(self) -> dict[str, Work]:
        """The work by what it is for, what costs most bytes first."""
        found: dict[str, Work] = defaultdict(Work)
        for (phase, operator), work in self.work.items():
            if work.launches or work.bytes:
                found[phase if phase in PHASE_GROUPS else GROUP_OF.get(operator, ELEMENTWISE)] += work
        return dict(sorted(found.items(), key=lambda item: -item[1].bytes))

    def phases(self) -> dict[str, Work]:
        found: dict[str, Work] = defaultdict(Work)
        for (phase, _), work in self.work.items():
            found[phase] += work
        return dict(found)

    def total(self) -> Work:
        whole = Work()
        for work in self.work.values():
            whole += work
        return whole

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        namespace, name = func._schema.name.split("::")
        if namespace != "prim":
            operator = name if namespace == "aten" else f"{namespace}::{name}"
            self.work[self._phase, operator] += self._of(func, operator, args, kwargs, result)
        return result

    def _of(self, func, operator: str, args: tuple, kwargs: dict, result) -> Work:
        given = cuda_operators.by_name(func, args, kwargs)
        tensors = list(tensors_in([*given.values(), result]))
        if operator in cuda_operators.FREE or func.is_view or not any(tensor.is_cuda for tensor in tensors):
            return Work(operators=1)
        if operator in OWN:
            with _disable_current_modes():
                traffic, passes = OWN[operator](*args, **kwargs)
            self.kernels.add(traffic)
            work = Work(1, sum(traffic.launches.values()), sum(traffic.least.values()))
            work.bf16_flops = passes * sum(traffic.flops.values())
        else:
            operator = cuda_operators.as_on_gpu(operator, backward=self._phase == "backward")
            moved = cuda_operators.bytes_of(func, operator, given, result)
            work = Work(1, cuda_operators.kernels_of(operator, given, result), moved)
        if count := self._flops.get(func._overloadpacket):
            work.flops = count(*args, **kwargs, out_val=result)
            work.bf16_flops = work.bf16_flops or work.flops * (chips.TF32 if tensors[0].dtype == torch.float32 else 1)
        return work


def _contrastive(image_feat, text_feat, image_feat_m, text_feat_m, image_queue, *rest) -> tuple[Traffic, int]:
    """What the loss's kernels do, and the bf16 products that one of theirs is worth."""
    ids, queue_ids, with_grad, _ = rest[-4:]
    (batch, dim), length, dtype = image_feat.shape, image_queue.shape[0], image_queue.dtype
    problem = kernel_traffic.Problem(batch, length, dim, dtype, ids is not None, queue_ids is not None, with_grad)
    plan = launch.default_plan(torch.device("cuda"), dtype, batch, length, dim, ids is not None)
    return kernel_traffic.contrastive(problem, plan), chips.TF32X3 if dtype == torch.float32 else 1


def _negatives(logits: Tensor, noise: Tensor, ids: Tensor | None, impl: str) -> tuple[Traffic, int]:
    return kernel_traffic.negatives(logits.shape[0], ids is not None, logits.dtype), 1


OWN: dict[str, Callable[..., tuple[Traffic, int]]] = {
    "albef_ds::queue_contrastive": _contrastive,
    "albef_ds::hard_negatives": _negatives,
}
