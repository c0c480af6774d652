"""Counts what a step does without timing it: FLOPs, operators, host syncs. Counts do not wobble.

FLOPs of a model of any size are counted on tensors that have shapes and no values (`FakeTensorMode`), in seconds and
without memory. A step asks its tensors for a few numbers (how many tokens are packed, how many labelled), which such
tensors cannot answer. They depend on the caption lengths and the chosen negatives alone, not on the model's width; so
the step first runs really, on a narrow model with the same batch, and `Recording` notes the answers for `Replay`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from albef_ds.training.flops import FlopCount

aten = torch.ops.aten


class OperatorCount(TorchDispatchMode):
    """Counts dispatched operators by name."""

    def __init__(self):
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.operators.values())

    @property
    def host_syncs(self) -> int:
        """Times that the host asks for a value or a data-dependent shape; on a GPU each one waits for all work."""
        return sum(n for name, n in self.operators.items() if name in SYNCING)


SYNCING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}


class Recording(TorchDispatchMode):
    """Notes, in order, every number that the host asks for and every shape that depends on data."""

    def __init__(self):
        super().__init__()
        self.answers: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if depends_on_data(func, args):
            self.answers.append(tuple(found.shape) if isinstance(found, torch.Tensor) else found)
        return found


class Replay(TorchDispatchMode):
    """Gives a run on tensors without values the answers of a `Recording`, in the same order."""

    def __init__(self, answers: list):
        super().__init__()
        self.answers = iter(answers)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not depends_on_data(func, args):
            return func(*args, **(kwargs or {}))
        answer = next(self.answers, None)
        if answer is None:
            raise RuntimeError(f"{func}: the step asks for more than it did on the narrow model")
        if isinstance(answer, tuple):
            return args[0].new_empty(answer, dtype=torch.int64 if func is aten.nonzero.default else args[0].dtype)
        return answer


def depends_on_data(func, args) -> bool:
    if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default):
        return True
    if func is aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return False


def count_flops(build: Callable[[object], tuple[nn.Module, Callable[[], object]]], config, narrow) -> int:
    """FLOPs of one step of `config`, forward and backward.

    Args:
        build: a model configuration to a model and a function that runs a step of it, always on one batch of real
            tensors; called twice.
        narrow: `config` at a width small enough to run; whatever depends on data must be the same in it.
    """
    _, step = build(narrow)
    with Recording() as recording:
        step()
    with torch.device("meta"):
        model, step = build(config)
    with FakeTensorMode(allow_non_fake_inputs=True), Replay(recording.answers):
        _without_values(model)
        with FlopCount() as flops:
            step()
    return flops.total


def _without_values(model: nn.Module) -> None:
    """Puts tensors without values, of the CPU by name, in place of a model's meta tensors; shared ones stay shared."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = made[id(tensor)]
