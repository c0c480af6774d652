"""What a step would launch on a GPU, operator by operator, with its bytes and FLOPs; nothing is computed.

    with fake_gpu.install(), LaunchCount() as count:
        step()

Each operator reads what it is given once and writes what it makes once, as a kernel that caches serve well does.
Repeated elements of an expanded tensor count once. How many kernels PyTorch launches for an operator stands in a table
here: one, save for those below. Left out are the zeros that select_backward and its like begin with, and cuDNN's
changes of layout. FLOPs are those of training/flops.py; our own kernels' bytes are counted in Triton's interpreter
(benchmarks.kernel_traffic).

Known to be wrong: flash-attn's backward counts the gradients that it writes as read, too (1.4 GB at ViT-B/16 and 64
samples), and as four kernels, where it has three; embedding_dense_backward has two below 3,073 indices; a convolution's
bias and an in-place lerp of more than 48 small tensors are a launch off.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from albef_ds.kernels import launch
from albef_ds.training.flops import FlopCount
from benchmarks import chips, kernel_traffic
from benchmarks.kernel_traffic import Traffic

# Operators that make no kernel run: views by another name, and memory without values.
FREE = {
    *("_reshape_alias", "_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh"),
    *("new_empty", "new_empty_strided", "set_", "sym_size", "is_same_size", "_fused_sdp_choice"),
}
# Kernels of one operator, where it is not one, as PyTorch 2.11 and flash-attn 2.8 launch them.
KERNELS = {
    "native_layer_norm_backward": 2,  # input; weight and bias
    "flash_attn::_flash_attn_varlen_forward": 1,
    "flash_attn::_flash_attn_varlen_backward": 4,  # products with the result, the gradients, two conversions
    "_flash_attention_backward": 4,
    "torch_attn::_varlen_attn_backward": 4,
    "_scaled_dot_product_efficient_attention_backward": 3,
    "_efficient_attention_backward": 3,
    "convolution_backward": 3,  # weight, bias, and the layout of the gradient
    "embedding_dense_backward": 5,  # sorted indices, then segments
    "sort": 3,
    "cumsum": 2,
}
# Tensors that one launch of a multi-tensor kernel takes, and elements of them that a block takes
# (ATen/native/cuda/MultiTensorApply.cuh).
MULTI_TENSOR = {"_foreach_lerp_": 48, "_fused_adamw_": 36}
BLOCKS, CHUNK = 320, 65536
# What is written without being read.
FILLED = {"copy_", "fill_", "zero_", "exponential_", "bernoulli_", "normal_", "uniform_", "random_"}
GATHERS = {"index_select", "embedding", "index", "gather"}  # of the source only the wanted rows are read
SCATTERS = {"index_copy_", "index_add_", "index_put_", "_index_put_impl_", "scatter_"}  # of the target only these rows

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
    "embedding embedding_dense_backward gather scatter scatter_ index_put index_put_ _unsafe_index_put "
    "_index_put_impl_ sort cumsum searchsorted constant_pad_nd repeat slice_backward select_backward slice_scatter",
}
ELEMENTWISE = "adds and other elementwise"
WHOLE = ("teacher", "optimiser", "queue")  # phases that are groups of their own, whatever operators they take
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


@dataclass
class Work:
    """Sums over operators."""

    operators: int = 0  # dispatched, views among them
    launches: int = 0
    bytes: int = 0  # read and written
    flops: int = 0
    slowness: int = 0  # FLOPs in bf16 that would take as long as these in their own precision

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
            if work.launches:
                found[phase if phase in WHOLE else GROUP_OF.get(operator, ELEMENTWISE)] += work
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
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if operator in FREE or func.is_view or not any(tensor.is_cuda for tensor in (*given, *made)):
            return Work(operators=1)
        if operator in OWN:
            with _disable_current_modes():
                traffic, passes = OWN[operator](*args, **kwargs)
            self.kernels.add(traffic)
            work = Work(1, sum(traffic.launches.values()), sum(traffic.least.values()))
            work.slowness = passes * sum(traffic.flops.values())
        else:
            work = Work(1, kernels_of(operator, args), bytes_of(func, operator, given, made, args, kwargs))
        if count := self._flops.get(func._overloadpacket):
            work.flops = count(*args, **kwargs, out_val=result)
            work.slowness = work.slowness or work.flops * (chips.TF32 if given[0].dtype == torch.float32 else 1)
        return work


def kernels_of(operator: str, args: tuple) -> int:
    if operator not in MULTI_TENSOR:
        return KERNELS.get(operator, 1)
    tensors = args[0]
    chunks = sum(-(-tensor.numel() // CHUNK) for tensor in tensors)
    return max(math.ceil(len(tensors) / MULTI_TENSOR[operator]), math.ceil(chunks / BLOCKS))


def bytes_of(func, operator: str, given: list[Tensor], made: list[Tensor], args: tuple, kwargs: dict) -> int:
    """Bytes read and written."""
    if operator in GATHERS or operator in SCATTERS:
        indices = [t for t in given[1:] if t.dtype in (torch.int64, torch.int32)]
        rows = made if operator in GATHERS else [t for t in given[1:] if not any(t is index for index in indices)]
        return 2 * sum(map(distinct, rows)) + sum(map(distinct, indices))
    written = changed(func, operator, args, kwargs)
    fresh = [] if func._schema.is_mutable else made
    read = given
    if operator in FILLED:
        read = [tensor for tensor in given if not any(tensor is target for target in written)]
    once = {id(tensor): tensor for tensor in read}
    return sum(map(distinct, once.values())) + sum(map(distinct, written)) + sum(map(distinct, fresh))


def changed(func, operator: str, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operator writes into."""
    if operator == "_fused_adamw_":  # its schema says that gradients are written: only where they are unscaled
        return [*args[0], *args[2], *args[3]]
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def distinct(tensor: Tensor) -> int:
    """Bytes of a tensor, elements that an expanded dimension repeats counted once."""
    repeated = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 0 and size > 1)
    return tensor.numel() // math.prod(repeated) * tensor.element_size()


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
