"""One rank of many, with nobody on the other side: what it asks of its neighbours, and of its own host.

    mode = fake_gpu.install()           # before torch is imported
    fake_ranks.join(rank=3, world=8)    # PyTorch's "fake" process group answers every collective at once, by nothing
    fake_ranks.take_gpu(3)              # this rank's GPU is cuda:3, with streams that know what they wait for
    with mode, fake_ranks.Watch(reads, copies, known) as watch:
        ...                             # DeepSpeed's engine, whole steps
    watch.collectives                   # what NCCL would have been asked for, in order

Whoever wants the collectives alone takes `Listen` in place of `Watch`; `leave` lets a process join as another rank
(benchmarks.fake_steps).
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import ROOT, fake_streams
from benchmarks.fake_streams import Order, memory_of, tensors_in, written_arguments

TORCH = f"{Path(torch.__file__).parent}{os.sep}"
aten = torch.ops.aten


class HostRead(RuntimeError):
    """The host asks the GPU for something: on a real one it waits until all that was launched is done."""


def join(rank: int, world: int, local_rank: int | None = None) -> None:
    """Joins a made-up group as a launcher's rank would, until `leave`. `local_rank` is the rank where none is given."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    local_rank = rank if local_rank is None else local_rank
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def leave() -> None:
    """Ends the group, and what DeepSpeed and the tasks remember of it."""
    import deepspeed

    from albef_ds.tasks.negatives import hosts

    hosts.cache_clear()
    deepspeed.comm.destroy_process_group()
    sys.excepthook = sys.__excepthook__  # which would say the rank, and that of every group before


def take_gpu(index: int, count: int = 8) -> None:
    """After `fake_gpu.install()`: the machine has `count` GPUs, and this process has the one of that index.

    PyTorch and DeepSpeed are changed globally, as by fake_gpu.
    """
    from deepspeed.accelerator import cuda_accelerator
    from deepspeed.ops.adam import cpu_adam

    nothing = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    for name, answer in {"device_count": count, "is_initialized": True, **dict.fromkeys(nothing, 0)}.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    current = [index]
    torch.cuda.current_device = lambda: current[0]
    torch.cuda.set_device = lambda device: current.__setitem__(0, torch.cuda._utils._get_device_index(device))
    torch.cuda.Stream, torch.cuda.Event = fake_streams.Stream, fake_streams.Event
    torch.cuda.stream, torch.cuda.synchronize = fake_streams.on_stream, fake_streams.synchronize
    torch.cuda.current_stream, torch.cuda.default_stream = fake_streams.current_stream, lambda *_: fake_streams.MAIN
    Tensor.record_stream = lambda self, stream: None  # PyTorch's own takes a real stream,
    Tensor.pin_memory = _pinned  # and asks the driver for the memory
    keep_parameters()
    # Groups of another backend (gloo, for what the hosts tell each other) would look for ranks that are not there.
    new_group = dist.new_group
    dist.new_group = functools.wraps(new_group)(lambda *a, backend=None, **k: new_group(*a, backend="fake", **k))
    cuda_accelerator.pynvml = None  # which would ask the driver, too
    cpu_adam.CPUAdamBuilder.load = lambda self, verbose=True: _CPUAdam


def keep_parameters() -> None:
    """Module.to leaves parameters without values alone; they must be where it would take them. PyTorch is changed
    globally."""
    torch.utils.swap_tensors = _swap_nothing


def _pinned(tensor: Tensor, device=None) -> Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin a tensor on {tensor.device}: only those of the CPU can be pinned")
    return tensor.clone()


def _swap_nothing(old: Tensor, new: Tensor) -> None:
    """In place of torch.utils.swap_tensors, by which Module.to takes a fake parameter elsewhere. That one cannot where
    anybody else holds the parameter, as the optimiser does."""
    if (old.device, old.dtype, old.shape) != (new.device, new.dtype, new.shape):
        raise RuntimeError(f"Module.to: {old.dtype} on {old.device} to {new.dtype} on {new.device}; call to_gpu first")


class _CPUAdam:
    """In place of DeepSpeed's compiled operator: computes nothing, and takes what that would take."""

    create_adam = destroy_adam = staticmethod(lambda *_: None)

    @staticmethod
    def adam_update(optimizer, step, lr, beta1, beta2, eps, decay, bias, *tensors: Tensor) -> None:
        for tensor in tensors:  # parameter, gradient, both moments: it reads them as arrays of one length
            found = tensor.device.type, tensor.dtype, tensor.is_contiguous(), tensor.numel()
            if found != ("cpu", torch.float32, True, tensors[0].numel()):
                raise RuntimeError(f"CPU Adam got (device, type, contiguous, elements) {found}")


@dataclass(frozen=True)
class Collective:
    """What all ranks must ask for alike, one after the other, or NCCL hangs; and where this one did."""

    kind: str  # the operator of c10d
    bytes: int  # that this rank hands over
    received: int  # bytes of what it gets back; of a reduce to one rank, what that one gets
    dtype: str
    root: int | None
    device: str  # cpu: what the hosts tell each other, through gloo
    stream: str

    @classmethod
    def of(cls, func: OpOverload, args: tuple) -> Collective:
        """Raises ValueError where NCCL would refuse the tensors."""
        if not all(tensor.is_contiguous() for value in args for tensor in tensors_in(value)):
            raise ValueError(f"{func._opname}: NCCL takes contiguous tensors alone")
        names = [argument.name for argument in func._schema.arguments]
        sent = next((i for i, name in enumerate(names) if name.startswith("input")), 0)
        tensors = list(tensors_in(args[sent]))
        root = args[names.index("root_rank")] if "root_rank" in names else None
        size, received = _size(tensors), _size(tensors_in(args[0]))  # what comes back stands first in every schema
        dtype, device = str(tensors[0].dtype), tensors[0].device.type
        return cls(func._opname, size, received, dtype, root, device, fake_streams.current_stream().name)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Watch(TorchDispatchMode):
    """Sees every operation. To be entered inside of the fake GPU's mode.

    Args:
        reads: who may ask the GPU for a value, and the answer: "file:function", the file's path from site-packages on.
        copies: who may copy from the GPU to the host and wait for it.
        known: values of tensors that lie on the host, where nobody waits for them, by who asks; taken in turn.

    Raises, at the operation: HostRead, fake_streams.Race.
    """

    def __init__(
        self, reads: Mapping[str, float | bool], copies: frozenset[str], known: Mapping[str, Sequence[int]]
    ) -> None:
        super().__init__()
        self._answers, self._copies = reads, copies
        self._known = {place: cycle(values) for place, values in known.items()}
        self._order = Order()
        self.reads: Counter[str] = Counter()
        self.collectives: list[Collective] = []
        self.written: set[StorageWeakRef] = set()  # to be emptied by whoever wants to know

    def __torch_dispatch__(self, func: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls; as FakeTensorMode answers it
            tensor = args[0]
            return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device
        if func is aten._local_scalar_dense.default and args[0].constant is None:
            self._order.add(func, args, kwargs, None)
            return self._read(args[0])
        if _waits(func, args, kwargs):
            self._copy()
        if func.namespace == "c10d":
            self.collectives.append(Collective.of(func, args))
        result = func(*args, **kwargs)
        self._order.add(func, args, kwargs, result)
        for key in written_arguments(func) or ():
            if isinstance(key, int) and key < len(args):
                self.written.update(map(memory_of, tensors_in(args[key])))
        return result

    def _read(self, tensor: Tensor) -> float | bool:
        place, line = _asking()
        if not tensor.is_cuda and place in self._known:
            return next(self._known[place])
        if place not in self._answers:
            raise HostRead(f"{place}, line {line}: the host reads a value of a tensor on {tensor.device}")
        self.reads[place] += 1
        return self._answers[place]

    def _copy(self) -> None:
        place, line = _asking()
        if place not in self._copies:
            raise HostRead(f"{place}, line {line}: a copy from the GPU to the host that the host waits for")


# What costs FakeTensorMode more than its own kernel: one tensor comes out, on the device of the first argument.
SIMPLE = {aten.view.default, aten.view.dtype, aten._unsafe_view.default, aten.detach.default, aten.alias.default}
SIMPLE |= {aten.slice.Tensor, aten.select.int, aten.t.default, aten.transpose.int, aten.expand.default}
SIMPLE |= {aten.mm.default, aten.bmm.default, aten.copy_.default, aten._to_copy.default}


def _harmless(dtype: torch.dtype) -> bool | int | float:
    """The answer to a host that reads a value: nothing is wrong, and there is something of everything."""
    return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


class Listen(TorchDispatchMode):
    """Notes the collectives and answers whatever the host reads, for a count of them in half of Watch's time.

    The simple operations that a step is mostly made of go past FakeTensorMode's bookkeeping, straight to their kernels
    for tensors without values: what comes out lies where the first argument does. To be entered inside of `mode`.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so at every operation takes longer than most of them

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # as in Watch
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        if func is aten._local_scalar_dense.default and args[0].constant is None:
            return _harmless(args[0].dtype)
        if func.namespace == "c10d":
            self.collectives.append(Collective.of(func, args))
            with in_kernel_invocation_manager(self._mode):
                result = func(*args, **kwargs)
            return (args[0], *result[1:]) if isinstance(result, tuple) else result
        if func in SIMPLE and kwargs.keys() <= {"dtype"} and type(args[0]) is FakeTensor:
            with in_kernel_invocation_manager(self._mode):
                result = func(*args, **kwargs)
            return args[0] if func is aten.copy_.default else FakeTensor(self._mode, result, args[0].fake_device)
        return func(*args, **kwargs)


def _waits(func: OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether it is a copy from a GPU to the host, and not one that goes on behind the host's back."""
    if func is aten._to_copy.default:
        source, target, lazy = args[0], kwargs.get("device"), kwargs.get("non_blocking", False)
    elif func is aten.copy_.default:
        source, target, lazy = args[1], args[0].device, len(args) > 2 and args[2] or kwargs.get("non_blocking", False)
    else:
        return False
    return source.is_cuda and target is not None and torch.device(target).type == "cpu" and not lazy


def _asking() -> tuple[str, int]:
    """Whose line leads to the operation that is dispatched now: "file:function", and the line."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    file = frame.f_code.co_filename.removeprefix(f"{ROOT}{os.sep}")
    file = re.split("(?:site|dist)-packages/", file)[-1]
    return f"{file}:{frame.f_code.co_name}", frame.f_lineno
