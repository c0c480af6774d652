"""Muon: the momentum of a weight matrix made orthogonal before it is applied (Jordan et al., 2024, "Muon: An optimizer
for hidden layers in neural networks"; under ZeRO as in Liu et al., 2025, arXiv:2502.16982).

The matrices of the transformers' blocks take it; all else (embeddings, heads, biases, norms) stays with AdamW.

torch.optim.Muon computes the same, but takes whole matrices, one after the other; ZeRO leaves an optimiser flat slices.
DeepSpeed's own Muon works where gradients are put into their slices: before clipping, not in the optimiser's step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from albef_ds.training.repartition import FlatLayout

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: Jordan's; take every singular value to 0.7 ... 1.2
_ITERATIONS = 5
_RMS = 0.2  # of an update's elements, as AdamW's is (Liu et al., section 2.2): learning rates and decay mean the same


@dataclass(frozen=True)
class Matrices:
    """The matrices of one group, laid end to end as ZeRO has them, and which elements of that vector are here.

    Args:
        shapes: of all matrices, in the order of the vector.
        first, last: what this rank holds is [first, last) of it.
        bounds: where one rank's part ends and the next one's begins.
    """

    shapes: tuple[tuple[int, int], ...]
    first: int
    last: int
    bounds: tuple[int, ...] = ()

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], rank: int, world_size: int) -> Matrices:
        """Rank `rank`'s part of a group that ZeRO divides among `world_size` ranks."""
        size = FlatLayout.of(shapes, world_size).slice_size
        bounds = tuple(size * r for r in range(1, world_size))
        return cls(tuple(tuple(shape) for shape in shapes.values()), rank * size, (rank + 1) * size, bounds)

    def whole(self, update: Tensor) -> Iterator[tuple[Tensor, int]]:
        """(matrix, its first element in the group's vector) for each that is at least partly here.

        update: [last - first] this rank's part of the vector. Matrices that a bound cuts are put together from the
        parts of all ranks: one all-reduce, collective.
        """
        start, cut = 0, []
        for shape in self.shapes:
            stop = start + math.prod(shape)
            if any(start < bound < stop for bound in self.bounds):
                cut.append((start, stop, shape))
            elif self.first <= start < self.last:
                yield update[start - self.first : stop - self.first].view(shape), start
            start = stop
        if not cut:
            return
        joined = update.new_zeros(sum(stop - start for start, stop, _ in cut))
        pieces = joined.split([stop - start for start, stop, _ in cut])
        for (start, stop, _), piece in zip(cut, pieces, strict=True):
            low, high = max(start, self.first), min(stop, self.last)
            if low < high:
                piece[low - start : high - start] = update[low - self.first : high - self.first]
        dist.all_reduce(joined)
        for (start, stop, shape), piece in zip(cut, pieces, strict=True):
            if start < self.last and stop > self.first:
                yield piece.view(shape), start


class Muon(torch.optim.AdamW):
    """Muon for the groups that say `"muon": True`, PyTorch's fused AdamW for the others.

    A group's `lr_ratio` times its `lr` is Muon's learning rate. State of a matrix, or of a ZeRO slice of matrices:
    `momentum`, of its shape, and `step`. Under ZeRO `divide` must say where the slices are before the first step.
    """

    def __init__(self, groups: Sequence[Mapping], **adamw) -> None:
        super().__init__(groups, **adamw)
        self._slices: dict[Tensor, Matrices] = {}

    def divide(self, flat: Tensor, matrices: Matrices) -> None:
        """A group's parameters have become this flat tensor: this rank's part of those matrices."""
        self._slices[flat] = matrices

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups  # of ZeRO: one after the other, alone
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: Mapping) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        updates = [self._momentum(p) for p in parameters]
        found: list[tuple[Tensor, Tensor, int]] = []  # matrix, the vector its result goes to, its first element there
        for parameter, update in zip(parameters, updates, strict=True):
            if (slices := self._slices.get(parameter)) is not None:
                found += [(matrix, update, start - slices.first) for matrix, start in slices.whole(update)]
            elif parameter.ndim == 2:
                found.append((update, update.view(-1), 0))
            else:
                raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} is no matrix, and no slice of any")
        for same in _of_one_shape(found):
            results = orthogonal(torch.stack([matrix for matrix, _, _ in same]))
            for result, (_, vector, start) in zip(results, same, strict=True):
                flat = result.reshape(-1)
                low, high = max(0, -start), min(flat.numel(), vector.numel() - start)
                vector[start + low : start + high] = flat[low:high]
        lr = group["lr"] * group["lr_ratio"]
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """The gradient's moving average, the newest gradient counted once more (Nesterov)."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW's way to load a state asks for it
        state["step"] += 1
        momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(momentum, MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """[K, M, N] matrices, each replaced by nearly the closest orthogonal one, its elements' root mean square _RMS.

    Computed in bf16: the iteration is made for it, and corrects what it rounds. A matrix of zeros stays one.
    """
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    x = x if matrices.shape[1] <= matrices.shape[2] else x.mT
    return x.to(matrices.dtype) * (_RMS * max(matrices.shape[1:]) ** 0.5)


def _of_one_shape(found: Sequence[tuple[Tensor, Tensor, int]]) -> list[list[tuple[Tensor, Tensor, int]]]:
    """Those that one batched product can take together."""
    groups: dict[tuple[int, ...], list] = defaultdict(list)
    for entry in found:
        groups[tuple(entry[0].shape)].append(entry)
    return list(groups.values())
