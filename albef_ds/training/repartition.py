"""ZeRO's optimiser state for another number of ranks.

ZeRO (stages 1 and 2) lays all parameters of a group end to end in one flat vector, pads it to a multiple of twice the
number of ranks, and gives every rank an equal slice of the master weights and of both moments. Here slices that any
number of ranks wrote are read as that one vector, and cut for any other number. The order of parameters may differ too
(round_robin_gradients orders them by the number of ranks): they are found by name.

    rank            0        1        2          written by 3
    flat       [ a a a b | b b c c | c c . . ]   a, b, c: parameters; a dot: padding
    flat       [ a a a b   b | b c c c c ]       read by 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from albef_ds.training.checkpoint_manifest import CheckpointError

_ALIGNMENT = 2  # elements a rank; ZeRO's nccl_start_alignment_factor


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter lies in a group's flat vector over `world_size` ranks, in elements."""

    sizes: tuple[tuple[str, int], ...]  # name, elements; in the order of the vector
    world_size: int

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], world_size: int) -> FlatLayout:
        return cls(tuple((name, math.prod(shape)) for name, shape in shapes.items()), world_size)

    @property
    def total(self) -> int:
        """Elements without the padding."""
        return sum(size for _, size in self.sizes)

    @property
    def slice_size(self) -> int:
        """Elements of one rank's slice, with the padding that the last ones have."""
        unit = _ALIGNMENT * self.world_size
        return -(-self.total // unit) * _ALIGNMENT

    def padding(self, rank: int) -> int:
        """How many elements at the end of this rank's slice are padding."""
        return min(self.slice_size, max(0, (rank + 1) * self.slice_size - self.total))

    @property
    def starts(self) -> dict[str, int]:
        names = [name for name, _ in self.sizes]
        return dict(zip(names, accumulate((size for _, size in self.sizes), initial=0), strict=False))


def cut_slice(old: FlatLayout, new: FlatLayout, rank: int, slice_of: Callable[[int], Tensor]) -> Tensor:
    """Rank `rank`'s slice [new.slice_size] of the vector that `old.world_size` slices make up; padding is 0.

    Args:
        slice_of: an old rank to its slice, with or without its padding; asked only for slices that are needed.

    Raises:
        CheckpointError: the parameters are others, or a slice is too short.
    """
    if dict(old.sizes) != dict(new.sizes):
        raise CheckpointError(_other_parameters(dict(old.sizes), dict(new.sizes)))
    first, last = rank * new.slice_size, (rank + 1) * new.slice_size
    result: Tensor | None = None
    old_starts, new_starts = old.starts, new.starts
    for name, size in new.sizes:
        start = max(new_starts[name], first)
        stop = min(new_starts[name] + size, last)
        if start >= stop:
            continue
        source = old_starts[name] + (start - new_starts[name])
        for piece in _read(old, source, source + stop - start, slice_of):
            if result is None:
                result = torch.zeros(new.slice_size, dtype=piece.dtype)
            result[start - first : start - first + piece.numel()] = piece
            start += piece.numel()
    if result is None:  # all padding; the type is that of any slice
        result = torch.zeros(new.slice_size, dtype=slice_of(0).dtype)
    return result


def _read(layout: FlatLayout, start: int, stop: int, slice_of: Callable[[int], Tensor]):
    """The pieces that make up [start, stop) of the flat vector."""
    width = layout.slice_size
    while start < stop:
        rank, offset = divmod(start, width)
        count = min(stop - start, width - offset)
        piece = slice_of(rank)
        if piece.ndim != 1 or piece.numel() < offset + count:
            raise CheckpointError(
                f"rank {rank}'s slice of the optimiser state has shape {tuple(piece.shape)}, "
                f"expected at least {offset + count} elements"
            )
        yield piece[offset : offset + count]
        start += count


def _other_parameters(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    missing, unknown = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    resized = sorted(k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k])
    parts = [f"{what}: {', '.join(names[:3])}" for what, names in
             (("missing", missing), ("unknown", unknown), ("of another size", resized)) if names]  # fmt: skip
    return f"the optimiser state is of other parameters ({'; '.join(parts)})"
