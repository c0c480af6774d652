"""Divides batches over the ranks of a process group and brings their results together; without a group, does nothing.

The unit is a whole batch: a batch then holds the same samples on any number of ranks, and so gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Ranks:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def all_objects(self, value) -> list:
        """The value of every rank, for small Python objects."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The sum over the ranks; exact where only one of them has something other than 0."""
        if self.size == 1:
            return tensor
        there = tensor.to(device)
        dist.all_reduce(there)
        return there.to(tensor.device)


@dataclass(frozen=True)
class Batches:
    """Items 0 to `total` in consecutive batches, the batches in consecutive blocks on the ranks."""

    total: int
    size: int
    ranks: Ranks

    @property
    def count(self) -> int:
        return -(-self.total // self.size)

    def rows(self, batch: int) -> range:
        return range(batch * self.size, min((batch + 1) * self.size, self.total))

    def owner(self, batch: int) -> int:
        return batch * self.ranks.size // self.count

    @property
    def mine(self) -> list[int]:
        return [batch for batch in range(self.count) if self.owner(batch) == self.ranks.rank]

    def share(self, parts: dict[int, Tensor], empty: Callable[[range], Tensor], device: torch.device) -> Tensor:
        """All parts, in order, on every rank.

        Args:
            parts: of this rank's batches, by number.
            empty: rows to a tensor as large and of the type as the part that belongs to them.
        """
        whole = []
        for batch in range(self.count):
            part = parts[batch] if batch in parts else empty(self.rows(batch))
            if self.ranks.size > 1:
                part = part.to(device).contiguous()
                dist.broadcast(part, src=self.owner(batch))
            whole.append(part)
        return torch.cat(whole)
