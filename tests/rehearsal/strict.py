"""What FakeTensorMode lets pass and a GPU does not: copies that wait, and arguments that compiled kernels refuse.

    with mode, Strict(): ...        # mode: of benchmarks.fake_gpu

FakeTensorMode knows shapes, and devices for the most part, but neither which dtypes a kernel is compiled for nor what a
copy costs. Here stand the operators that a training step uses; each check says what PyTorch's or flash-attn's C++ says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(RuntimeError):
    """The host would wait for the GPU here."""


class Refused(RuntimeError):
    """A kernel would refuse these arguments."""


class Strict(TorchDispatchMode):
    """Raises Waits or Refused where a step on a GPU would wait for it, or fail.

    Attributes:
        seen: names of the operators that were checked.
    """

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, check = _check_of(func)
        if check:
            self.seen.add(name)
            check(func, *args, **kwargs)
        return func(*args, **kwargs)

    def __enter__(self):
        self._stack = ExitStack()
        for place in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            self._stack.enter_context(mock.patch.object(place, "synchronize", _synchronize))
        return super().__enter__()

    def __exit__(self, *raised):
        self._stack.close()
        return super().__exit__(*raised)


def _synchronize(*_, **__) -> None:
    raise Waits("synchronize() waits for the GPU")


def _copy(func, source: Tensor, *_, device: torch.device | None = None, non_blocking: bool = False, **__) -> None:
    _crosses(source, torch.device(device or source.device), non_blocking)


def _copy_into(func, target: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    _crosses(source, target.device, non_blocking)


def _crosses(source: Tensor, target: torch.device, non_blocking: bool) -> None:
    if source.device.type == target.type:
        return
    # To the host PyTorch allocates the target pinned by itself; to the GPU the source must be so already.
    if source.device.type == "cpu" and not source.is_pinned():
        raise Waits(f"a copy of {_said(source)} to {target.type} from memory that is not pinned")
    if not non_blocking:
        raise Waits(f"a copy of {_said(source)} to {target.type} without non_blocking=True")


def _indexed(func, target: Tensor, indices, values: Tensor | None = None, *_, **__) -> None:
    for index in filter(None.__ne__, indices):
        if index.is_cuda and not target.is_cuda:
            raise Refused(f"an index of {_said(index)} into {_said(target)}")
        if target.is_cuda and not index.is_cuda:
            raise Waits(f"an index of {_said(index)} lies on the host and is copied to {target.device.type}")
        if index.dtype in (torch.bool, torch.uint8) and values is not None and values.numel() != 1:
            raise Waits("assigning through a boolean index counts on the host what is chosen")


def _alike(func, *values, **_) -> None:
    tensors = [value for value in values if isinstance(value, Tensor)]
    dtypes, devices = {str(t.dtype) for t in tensors}, {t.device.type for t in tensors}
    if len(dtypes) > 1:
        raise Refused(f"{func} of different dtypes: {', '.join(sorted(dtypes))}")
    if len(devices) > 1:
        raise Refused(f"{func} of tensors on different devices: {', '.join(sorted(devices))}")


def _looked_up(func, *values, **_) -> None:
    """embedding(weight, index), index_select(self, dim, index)."""
    index = [value for value in values if isinstance(value, Tensor)][1]
    if index.dtype not in (torch.int64, torch.int32):
        raise Refused(f"{func} needs int64 or int32 indices, got {index.dtype}")


def _int64(func, target: Tensor, *rest, **_) -> None:
    index = next(value for value in rest if isinstance(value, Tensor))
    if index.dtype != torch.int64:
        raise Refused(f"{func} needs int64 indices or labels, got {index.dtype}")


def _rows(func, target: Tensor, dim: int, index: Tensor, source: Tensor, **_) -> None:
    _int64(func, target, index)
    _alike(func, target, source)
    if index.device != target.device:
        raise Refused(f"{func} of {_said(target)} with an index of {_said(index)}")


def _flash(func, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *_, **__) -> None:
    """mha_varlen_fwd of flash-attn's csrc/flash_attn/flash_api.cpp, of which torch has a copy."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Refused(f"flash-attn knows fp16 and bf16 alone, got {q.dtype}")
    _packed(q, k, v, cu_q, cu_k)
    if q.dim() != 3 or k.shape[1:] != q.shape[1:] or k.shape != v.shape:
        raise Refused(f"flash-attn needs [T, H, d] of one H and d, got {[list(t.shape) for t in (q, k, v)]}")
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise Refused(f"flash-attn needs heads of a multiple of 8 numbers, at most 256, got {q.shape[2]}")


def _flash_backward(func, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *_, **__) -> None:
    _alike(func, grad, q, k, v, out)


def _efficient_forward(func, q, k, v, bias, cu_q, cu_k, max_q: int, max_k: int, dropout_p: float, *_, **__) -> None:
    """_efficient_attention_forward of torch's attention.cu."""
    _efficient(func, q, k, v, bias, cu_q, cu_k)
    if cu_q is not None and dropout_p:  # not refused, but wrong: pytorch/pytorch#115590
        raise Refused("memory-efficient attention drops out other probabilities backward where rows are packed")


def _efficient(func, q: Tensor, k: Tensor, v: Tensor, bias, cu_q: Tensor | None, cu_k: Tensor | None) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise Refused(f"memory-efficient attention knows fp32, fp16 and bf16, got {q.dtype}")
    if cu_q is None:
        return _alike(func, q, k, v)
    _packed(q, k, v, cu_q, cu_k)
    if any(t.dim() != 4 or t.shape[0] != 1 for t in (q, k, v)):
        raise Refused(f"with cu_seqlens memory-efficient attention needs [1, T, H, d], got {list(q.shape)}")
    if bias is not None:
        raise Refused("memory-efficient attention knows no bias beside cu_seqlens")


def _padded(func, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *_, **__) -> None:
    """_scaled_dot_product_efficient_attention: [N, H, L, d] of one dtype, a bias of theirs."""
    _alike(func, q, k, v, bias)
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused("attention needs a contiguous last dimension")


def _efficient_backward(func, grad, q, k, v, bias, out, cu_q, cu_k, max_q: int, max_k: int, *_, **__) -> None:
    """_efficient_attention_backward of torch's attention_backward.cu, which asks for more than the forward pass."""
    _efficient(func, q, k, v, bias, cu_q, cu_k)
    _alike(func, grad, q, k, v, out)
    for name, longest, rows in (("max_seqlen_q", max_q, q.shape[1]), ("max_seqlen_k", max_k, k.shape[1])):
        if cu_q is not None and not 0 < longest <= rows:
            raise Refused(
                f"memory-efficient attention's backward needs {name} from 1 to {rows}, its rows: got {longest}"
            )


def _packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    _alike("attention", q, k, v)
    for cu_seqlens in (cu_q, cu_k):
        if cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_cuda or not cu_seqlens.is_contiguous():
            raise Refused(f"cu_seqlens must be contiguous int32 on the GPU, got {_said(cu_seqlens)}")
    if cu_q.shape != cu_k.shape:
        raise Refused(f"as many runs of queries as of keys are needed, got {len(cu_q) - 1} and {len(cu_k) - 1}")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused("attention needs a contiguous last dimension")


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device.type}"


CHECKS: dict[str, Callable[..., None]] = {
    "aten::_to_copy": _copy,
    "aten::copy_": _copy_into,
    **dict.fromkeys(("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"), _indexed),
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"), _alike),
    **dict.fromkeys(("aten::convolution", "aten::native_layer_norm"), _alike),
    "aten::searchsorted": _alike,
    **dict.fromkeys(("aten::embedding", "aten::index_select"), _looked_up),
    **dict.fromkeys(("aten::gather", "aten::scatter", "aten::scatter_"), _int64),
    **dict.fromkeys(("aten::index_copy", "aten::index_copy_", "aten::index_add", "aten::index_add_"), _rows),
    "aten::nll_loss_forward": _int64,
    "flash_attn::_flash_attn_varlen_forward": _flash,
    "flash_attn::_flash_attn_varlen_backward": _flash_backward,
    "aten::_flash_attention_forward": _flash,
    "aten::_flash_attention_backward": _flash_backward,
    "torch_attn::_varlen_attn": _flash,
    "torch_attn::_varlen_attn_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention": _padded,
    "aten::_efficient_attention_forward": _efficient_forward,
    "aten::_efficient_attention_backward": _efficient_backward,
}


@functools.cache
def _check_of(func) -> tuple[str, Callable[..., None] | None]:
    return func._schema.name, CHECKS.get(func._schema.name)
