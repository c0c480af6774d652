"""One attention function for every layer of the model; flash-attn, torch's SDPA and plain arithmetic stand behind it.

Sequences come packed: N runs of rows, one after another, described by a `Spans`. A query run attends to the key run of
the same number, so cross-attention of several texts to one image is one long query run over that image's keys, which
are read where they lie.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "flash", "sdpa", "eager")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spans:
    """N consecutive runs of rows: run i is rows cu_seqlens[i] : cu_seqlens[i + 1].

    `max_length` (a host number) bounds the longest run. `regular`: every run has exactly max_length rows, so the packed
    rows are a plain [N, max_length] array.
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

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] to [N, max_length, ...], zeros where there is no row."""
        if self.regular:
            return rows.unflatten(0, (self.num, self.max_length))
        padded = rows.new_zeros(self.num * self.max_length, *rows.shape[1:])
        return padded.index_copy(0, self.slots, rows).unflatten(0, (self.num, self.max_length))

    def unpad(self, padded: Tensor) -> Tensor:
        """[N, max_length, ...] to [T, ...]."""
        rows = padded.flatten(0, 1)
        return rows if self.regular else rows.index_select(0, self.slots)


@lru_cache(maxsize=1)
def flash_attn_available() -> bool:
    """Whether flash-attn 2 and a GPU to run it on are here; the one place that detects it."""
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


@lru_cache(maxsize=16)
def resolve_backend(name: str, device_type: str, dtype: torch.dtype) -> str:
    """Picks the backend once for a kind of input and says so once.

    Raises:
        ValueError: the name is unknown, or flash-attn is asked for where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"model.attention: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    half = dtype in (torch.float16, torch.bfloat16)
    flash_runs = device_type == "cuda" and half and flash_attn_available()
    if name == "flash" and not flash_runs:
        raise ValueError(
            "model.attention: flash needs a CUDA device, bf16 or fp16 arithmetic and the flash-attn package "
            f"(pip install 'albef_ds[flash]'); here: {device_type}, {dtype}. Use attention: auto"
        )
    chosen = ("flash" if flash_runs else "sdpa") if name == "auto" else name
    log.info("attention on %s in %s: %s", device_type, str(dtype).removeprefix("torch."), chosen)
    return chosen


def attention(q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans, dropout_p=0.0, backend="auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each pair of runs; dropout on the probabilities.

    Args:
        q: [Tq, H, d]; k, v: [Tk, H, d]. The last dimension must be contiguous.
        q_spans, k_spans: N runs each; run i of q attends to all of run i of k.
        backend: one of BACKENDS.

    Returns:
        [Tq, H, d]
    """
    if q_spans.num != k_spans.num:
        raise ValueError(f"attention needs as many query runs as key runs, got {q_spans.num} and {k_spans.num}")
    backend = resolve_backend(backend, q.device.type, q.dtype)
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q,
            k,
            v,
            q_spans.cu_seqlens,
            k_spans.cu_seqlens,
            q_spans.max_length,
            k_spans.max_length,
            dropout_p=dropout_p,
        )
    dtype = q.dtype
    if q.device.type == "cpu" and dtype != torch.float64:
        # The CPU's attention kernel takes five times as long backward in bf16 as in fp32 (ds_configs/README.md).
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (spans.pad(x).transpose(1, 2) for spans, x in ((q_spans, q), (k_spans, k), (k_spans, v)))
    mask = None if k_spans.regular else k_spans.mask[:, None, None, :]
    attend = F.scaled_dot_product_attention if backend == "sdpa" else eager_attention
    with torch.autocast(q.device.type, enabled=False):  # which would cast the operands back
        out = attend(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    return q_spans.unpad(out.transpose(1, 2)).to(dtype)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """The definition, [N, H, L, d], softmax in fp32 at least: what the other backends are tested against."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return F.dropout(probabilities, dropout_p) @ v
