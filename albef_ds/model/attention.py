"""One attention function for every layer of the model; flash-attn, torch's own kernels and plain arithmetic stand
behind it.

Sequences come packed: N runs of rows, one after another, described by a `Spans`. A query run attends to the key run of
the same number, so cross-attention of several texts to one image is one long query run over that image's keys, which
are read where they lie. No backend asks a GPU how long a run is.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from albef_ds import optional
from albef_ds.model.spans import KeysOfPieces, Spans, side_by_side

BACKENDS = ("auto", "flash", "varlen", "efficient", "sdpa", "eager")
ON_A_GPU = ("flash", "varlen", "efficient", "eager")  # what `auto` tries, in this order
ON_A_CPU = {torch.bfloat16: ("eager",)}  # else sdpa, which is slower there (ds_configs/README.md)
SHORT = 32  # rows that a CPU takes at once, where runs are at most half as long

log = logging.getLogger(__name__)


@lru_cache(maxsize=64)
def resolve_backend(
    name: str, device_type: str, dtype: torch.dtype, dropout: bool = False, head_dim: int | None = None
) -> str:
    """Picks the backend once for a kind of input and says so once.

    Args:
        dropout: whether probabilities are dropped out; said, and no obstacle to any of them.
        head_dim: None: one that all backends know.

    Raises:
        ValueError: the name is unknown, or the backend is asked for where it cannot run; says why.
    """
    if name not in BACKENDS:
        raise ValueError(f"model.attention: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    kind, passed_over = (device_type, dtype, head_dim), ""
    if name == "auto":
        for name in ON_A_GPU if device_type == "cuda" else ON_A_CPU.get(dtype, ("sdpa",)):
            if not (why := obstacle(name, *kind)):
                break
            passed_over += f"; {name} {why}"
    elif why := obstacle(name, *kind):
        raise ValueError(
            f"model.attention: {name} {why}; here: {device_type}, {_short(dtype)}, heads of {head_dim or 'any'} "
            f"numbers, dropout {'on' if dropout else 'off'}. Use attention: auto"
        )
    _say_once(f"attention on {device_type} in {_short(dtype)}{' with dropout' if dropout else ''}: {name}{passed_over}")
    return name


def obstacle(backend: str, device_type: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why a backend cannot compute this kind of input; None: it can."""
    if backend in ("sdpa", "eager"):
        return None
    if device_type != "cuda":
        return "needs a CUDA device"
    if backend != "flash" and (head_dim or 0) % 8:  # flash-attn pads the heads itself
        return "needs heads of a multiple of 8 numbers"
    if backend == "efficient":
        return None if dtype in (torch.float32, torch.float16, torch.bfloat16) else "needs fp32, bf16 or fp16"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs bf16 or fp16 arithmetic"
    if (head_dim or 0) > 256:
        return "needs heads of at most 256 numbers"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or later"
    if backend == "varlen":
        return _missing("varlen")
    if why := _missing("flash-attn"):
        return why
    try:  # a build for another torch or CUDA is there, and fails
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:
        return f"cannot be imported ({error})"
    return None


def _missing(package: str) -> str | None:
    found = optional.find(package)
    return None if found.available else f"is not available: {found.reason}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache
def _say_once(line: str) -> None:
    log.info(line)


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_spans: Spans, k_spans: Spans, dropout_p=0.0, backend="auto", causal=False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each pair of runs; dropout on the probabilities.

    Args:
        q: [Tq, H, d]; k, v: [Tk, H, d]. The last dimension must be contiguous.
        q_spans, k_spans: N runs each; run i of q attends to all of run i of k.
        backend: one of BACKENDS.
        causal: row j of a run attends to rows 0 to j of it. For self-attention: both spans must be the same runs.

    Returns:
        [Tq, H, d]
    """
    if q_spans.num != k_spans.num:
        raise ValueError(f"attention needs as many query runs as key runs, got {q_spans.num} and {k_spans.num}")
    if causal and not q_spans.same_runs(k_spans):
        raise ValueError("causal attention is self-attention: query and key runs must be the same, these differ")
    backend = resolve_backend(backend, q.device.type, q.dtype, dropout_p > 0, q.shape[-1])
    if reads_packed(backend, dropout_p > 0):
        return packed_attention(backend, q, k, v, q_spans, k_spans, dropout_p, causal)
    dtype, on_cpu = q.dtype, q.device.type == "cpu"
    if on_cpu and backend == "sdpa" and dtype != torch.float64:
        # Its kernel takes five times as long backward in bf16 as in fp32 there.
        q, k, v = q.float(), k.float(), v.float()
    out = padded_attention(backend, q, k, v, q_spans, k_spans, dropout_p, causal)
    return out.to(dtype)


def reads_packed(backend: str, dropout: bool) -> bool:
    """Whether a backend takes the rows as they lie; the others pad them first.

    torch's memory-efficient kernel drops out other probabilities backward than forward where rows are packed: its
    forward pass takes every run's keys for none there (https://github.com/pytorch/pytorch/issues/115590).
    """
    return backend in ("flash", "varlen") or (backend == "efficient" and not dropout)


def self_attention(qkv: Tensor, spans: Spans, dropout_p: float = 0.0, backend: str = "auto") -> Tensor:
    """`attention` of rows to the rows of their own run, queries, keys and values projected in one piece.

    Args:
        qkv: [T, 3, H, d].

    Returns:
        [T, H, d]
    """
    backend = resolve_backend(backend, qkv.device.type, qkv.dtype, dropout_p > 0, qkv.shape[-1])
    if backend != "flash":
        return attention(*qkv.unbind(1), spans, spans, dropout_p, backend)
    from flash_attn import flash_attn_varlen_qkvpacked_func

    # Its gradient comes in one piece too; three of them would have to be stacked.
    same_bits = torch.are_deterministic_algorithms_enabled()
    bounds = (spans.cu_seqlens, spans.max_length)
    return flash_attn_varlen_qkvpacked_func(qkv, *bounds, dropout_p=dropout_p, deterministic=same_bits)


def padded_attention(backend: str, q, k, v, q_spans: Spans, k_spans: Spans, dropout_p: float, causal: bool) -> Tensor:
    """Backends that are given padded rows. Short runs are taken together on a CPU. Query runs whose bound is far
    above their length are cut into pieces, each with a copy of its keys."""
    each = SHORT // max(q_spans.max_length, k_spans.max_length) if q.is_cpu and backend == "eager" else 1
    of_piece = None
    if each > 1 and q_spans.num > 1:
        joined = side_by_side(q_spans, k_spans, each, causal)
        q_spans, k_spans, mask, causal = joined.q_spans, joined.k_spans, joined.mask, False
    else:
        # Padding stands behind its run: no row that counts looks that far where attention is causal.
        mask = None if k_spans.regular or causal else k_spans.mask[:, None, None, :]
        if not causal and q_spans.cutting_pays:
            q_spans, of_piece = q_spans.pieces
    q, k, v = (spans.pad(x).transpose(1, 2) for spans, x in ((q_spans, q), (k_spans, k), (k_spans, v)))
    if of_piece is not None:
        k, v = (KeysOfPieces.apply(x, of_piece) for x in (k, v))
        mask = None if mask is None else mask.index_select(0, of_piece)
    with torch.autocast(q.device.type, enabled=False):  # which would cast the operands back
        out = PADDED[backend](q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal)
    return q_spans.unpad(out.transpose(1, 2))


def packed_attention(backend: str, q, k, v, q_spans: Spans, k_spans: Spans, dropout_p: float, causal: bool) -> Tensor:
    """Kernels that take packed rows as they are: flash-attn's, torch's own copy of it, and torch's memory-efficient
    one, which knows fp32 too."""
    # A bound may exceed all rows there are, which the memory-efficient kernel's backward pass refuses.
    longest = (min(spans.max_length, spans.num_rows) for spans in (q_spans, k_spans))
    bounds = (q_spans.cu_seqlens, k_spans.cu_seqlens, *longest)
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        same_bits = torch.are_deterministic_algorithms_enabled()  # flash-attn does not ask for itself
        return flash_attn_varlen_func(q, k, v, *bounds, dropout_p=dropout_p, causal=causal, deterministic=same_bits)
    if backend == "efficient":
        # As torch's nested tensors call it: one batch of all rows. 1 is a causal mask, from the first row on.
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        kernel = torch.ops.aten._efficient_attention_forward
        return kernel(q[None], k[None], v[None], None, *bounds, dropout_p, int(causal), learning)[0].squeeze(0)
    if dropout_p:  # the operator behind varlen_attn, which hands dropout on to nobody; torch's nested tensors do
        return torch.ops.aten._flash_attention_forward(q, k, v, *bounds, dropout_p, causal, False)[0]
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, *bounds, window_size=(-1, 0 if causal else -1))


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """torch's memory-efficient kernel alone: it takes a padding mask and dropout, and keeps no [L, L] scores."""
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """The definition, [N, H, L, d], softmax in fp32 at least: what the other backends are tested against."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return F.dropout(probabilities, dropout_p) @ v


PADDED = {"sdpa": F.scaled_dot_product_attention, "efficient": efficient_attention, "eager": eager_attention}
