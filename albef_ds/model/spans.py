"""Packed sequences: N runs of rows, one after another, and the ways to hand them to a kernel that knows no such thing.

Nothing here asks a GPU how long a run is: all shapes follow from numbers that the host has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 128  # rows of the pieces that long query runs are cut into, where padding them would cost more


@dataclass(frozen=True)
class Spans:
    """N consecutive runs of rows: run i is rows cu_seqlens[i] : cu_seqlens[i + 1].

    `max_length` (a host number) bounds the longest run, and may be far above it. `regular`: every run has exactly
    max_length rows, so the packed rows are a plain [N, max_length] array.
    """

    cu_seqlens: Tensor  # [N + 1] int32
    max_length: int
    num_rows: int
    regular: bool = False

    @classmethod
    def equal(cls, num: int, length: int, device: torch.device | str) -> Spans:
        cu_seqlens = torch.arange(0, (num + 1) * length, length, dtype=torch.int32, device=device)
        return cls(cu_seqlens, length, num * length, regular=True)

    @property
    def num(self) -> int:
        return self.cu_seqlens.numel() - 1

    @cached_property
    def lengths(self) -> Tensor:  # [N] int64
        return self.cu_seqlens.long().diff()

    @cached_property
    def run_of_row(self) -> Tensor:  # [T] int64
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:], rows, right=True)

    @cached_property
    def offset_in_run(self) -> Tensor:  # [T] int64
        rows = torch.arange(self.num_rows, device=self.cu_seqlens.device)
        return rows - self.cu_seqlens.long()[self.run_of_row]

    @cached_property
    def slots(self) -> Tensor:
        """[T] int64: where each row stands in the padded [N * max_length]."""
        return self.run_of_row * self.max_length + self.offset_in_run

    @cached_property
    def mask(self) -> Tensor:
        """[N, max_length] bool: which padded places hold a row."""
        places = torch.arange(self.max_length, device=self.cu_seqlens.device)
        return places[None, :] < self.lengths[:, None]

    def joined(self, each: int) -> Spans:
        """`each` runs as one; the last may be fewer. On a GPU this would wait for it."""
        cu_seqlens = torch.cat([self.cu_seqlens[:-1:each], self.cu_seqlens[-1:]])
        even = self.regular and self.num % each == 0
        return Spans(cu_seqlens, int(cu_seqlens.diff().max()), self.num_rows, regular=even)

    @property
    def padded_rows(self) -> int:
        return self.num * self.max_length

    @property
    def cutting_pays(self) -> bool:
        """Whether pieces have less than a quarter of the rows that padding to the longest run could have."""
        return not self.regular and 4 * (self.num_rows + self.num * PIECE) < self.padded_rows

    @cached_property
    def pieces(self) -> tuple[Spans, Tensor]:
        """The runs cut into pieces of at most PIECE rows, and [N'] int64: which run each is of.

        N' is how many there can be, as the host knows without asking; what there is not is an empty piece at the end.
        """
        count = self.lengths.add(PIECE - 1).div(PIECE, rounding_mode="floor")  # [N]
        ends = count.cumsum(0)
        number = torch.arange(self.num_rows // PIECE + self.num, device=ends.device)
        run = torch.searchsorted(ends, number, right=True).clamp(max=self.num - 1)
        starts = self.cu_seqlens.long()[run] + (number - (ends - count)[run]) * PIECE
        cu_seqlens = F.pad(starts.clamp(max=self.num_rows), (0, 1), value=self.num_rows).int()
        return Spans(cu_seqlens, PIECE, self.num_rows), run

    @cached_property
    def beside(self) -> dict[tuple[int, int, bool], SideBySide]:
        """What `side_by_side` made of these queries, for the next layer."""
        return {}

    def same_runs(self, other: Spans) -> bool:
        """Whether both have the same runs; on a GPU, where a look would wait for it, judged by the host's numbers."""
        if self is other:
            return True
        mine, theirs = ((s.num, s.max_length, s.num_rows) for s in (self, other))
        return mine == theirs and (self.cu_seqlens.is_cuda or torch.equal(self.cu_seqlens, other.cu_seqlens))

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] to [N, max_length, ...], zeros where there is no row."""
        if self.regular:
            return rows.unflatten(0, (self.num, self.max_length))
        padded = rows.new_zeros(self.padded_rows, *rows.shape[1:])
        return padded.index_copy(0, self.slots, rows).unflatten(0, (self.num, self.max_length))

    def unpad(self, padded: Tensor) -> Tensor:
        """[N, max_length, ...] to [T, ...]."""
        rows = padded.flatten(0, 1)
        return rows if self.regular else rows.index_select(0, self.slots)


@dataclass(frozen=True)
class SideBySide:
    """Several runs as one, and what keeps them apart."""

    q_spans: Spans
    k_spans: Spans
    mask: Tensor  # [N', 1, Lq, Lk] bool
    of: Spans | None  # the keys' own runs where they are not the queries': kept, so that their id stays theirs


def side_by_side(q_spans: Spans, k_spans: Spans, each: int, causal: bool) -> SideBySide:
    """`each` runs as one: to begin with a run of a few rows takes a CPU longer than to compute it. Made once for all
    layers that have these spans."""
    made = q_spans.beside
    key = (id(k_spans), each, causal)
    if key not in made:
        queries = q_spans.joined(each)
        keys = queries if k_spans is q_spans else k_spans.joined(each)
        of_query = queries.pad(q_spans.run_of_row + 1)  # 0 where there is no row
        of_key = keys.pad(k_spans.run_of_row + 1)
        mask = of_query[:, :, None] == of_key[:, None, :]
        if causal:
            mask &= torch.ones(mask.shape[1:], dtype=torch.bool).tril()
        mask |= (of_query == 0)[:, :, None]  # what is no row looks at something, too: a softmax over nothing is NaN
        made[key] = SideBySide(queries, keys, mask[:, None], None if k_spans is q_spans else k_spans)
    return made[key]


class KeysOfPieces(torch.autograd.Function):
    """Keys [N, ...] of runs to those of their pieces [N', ...]; gradients of a run's pieces are summed in fp32."""

    @staticmethod
    def forward(ctx, keys: Tensor, run: Tensor) -> Tensor:
        ctx.save_for_backward(run)
        ctx.shape = keys.shape
        return keys.index_select(0, run)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (run,) = ctx.saved_tensors
        exact = torch.promote_types(gradient.dtype, torch.float32)
        summed = gradient.new_zeros(ctx.shape, dtype=exact).index_add_(0, run, gradient.to(exact))
        return summed.to(gradient.dtype), None
