"""A GPU that computes on the CPU: its tensors say that they lie on cuda:0, and what CUDA refuses there is refused.

    fake_gpu.install(flash=False)       # before torch is imported
    with policed.install(): evaluate(model.to("cuda"), …, torch.device("cuda", 0))

Unlike those of benchmarks.fake_gpu, these tensors have values, so that what reads them on the host can be run:
evaluation, and the use of a trained model. An operator that gets tensors of both devices is refused, but where CUDA
takes them: a copy; a number (a tensor without dimensions) on the host beside tensors on the GPU, elementwise; an index
on the host into a tensor on the GPU by brackets, which copies it. A tensor on the GPU has no `.numpy()`.

What is not real: kernels (the CPU's compute; packed attention is said in packed_kernels), streams, time, memory, and
which dtypes CUDA's kernels are compiled for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.rehearsal.packed_kernels import KERNELS

GPU = torch.device("cuda", 0)
COPIES = ("aten::copy_", "aten::_to_copy")
BY_BRACKETS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
NUMBERS_TOO = ("aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::index_fill", "aten::index_fill_")


class Refused(RuntimeError):
    """CUDA would refuse this."""


class OnGpu(Tensor):
    """`inner`, on the host, holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, device=GPU, **layout)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, *_, **__) -> str:
        return f"OnGpu({self.inner})"

    def tolist(self) -> list:
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Policed(TorchDispatchMode):
    """While it lasts, tensors that are made on "cuda" or moved there are `OnGpu`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def install() -> Policed:
    """Makes this process a machine with one GPU, for as long as it lives; benchmarks.fake_gpu.install() came before.

    Returns:
        The mode to enter.
    """
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the host, then moved
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    return Policed()


def _run(func, args: tuple, kwargs: dict) -> object:
    flat, layout = tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, OnGpu)]
    here = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnGpu)]
    if there and here:
        _refuse(func, args, there, here)
    inner_args, inner_kwargs = tree_unflatten([_on_the_host(x) for x in flat], layout)
    found = KERNELS.get(func._schema.name, func)(*inner_args, **inner_kwargs)
    for x in there:
        if (x.shape, x.stride()) != (x.inner.shape, x.inner.stride()):
            raise NotImplementedError(f"{func} changes the shape of its operand, which this stand-in cannot follow")
    device = kwargs.get("device")
    if not (there if device is None else device.type == "cuda"):
        return found
    operands = {id(x.inner): x for x in there} | {id(x): x for x in here}

    def result(x: object) -> object:
        if id(x) in operands:  # changed in place: the same tensor as before
            return operands[id(x)]
        return OnGpu(x) if isinstance(x, Tensor) else x

    return tree_map(result, found)


def _on_the_host(x: object) -> object:
    if isinstance(x, OnGpu):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _refuse(func: Callable, args: tuple, there: list[OnGpu], here: list[Tensor]) -> None:
    """Raises Refused where CUDA would for these operands, `there` on the GPU and `here` on the host."""
    name = func._schema.name
    if name in COPIES:
        return
    if name in BY_BRACKETS:
        if not isinstance(args[0], OnGpu):
            raise Refused("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        wrong = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, OnGpu) and x.dim()]
    elif torch.Tag.pointwise in func.tags or name in NUMBERS_TOO:
        written = [x for x, formal in zip(args, func._schema.arguments, strict=False) if _is_written(formal)]
        wrong = [x for x in here if x.dim() or any(x is y for y in written)]
    else:
        wrong = here
    if wrong:
        raise Refused(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}: {_said(wrong)} on cpu beside {_said(there)} on cuda:0)"
        )


def _is_written(formal) -> bool:
    return formal.alias_info is not None and formal.alias_info.is_write


def _said(tensors: list[Tensor]) -> str:
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in tensors)
