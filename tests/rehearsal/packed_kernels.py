"""What a GPU's kernels for packed attention compute, said plainly on the CPU, forward and backward: without dropout.

KERNELS: {operator: what takes its arguments}; torch's memory-efficient attention and its copy of flash-attn's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None):
    """torch_attn::_varlen_attn: q [Tq, H, d]; k, v [Tk, H, d]; returns [Tq, H, d] and what is kept for backward."""
    return _forward(q, k, v, cu_q, cu_k, is_causal), q.new_zeros(q.shape[1], len(q)), q.new_zeros(2)


def varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, *_):
    """torch_attn::_varlen_attn_backward: gradients of q, k and v."""
    return _backward(grad, q, k, v, cu_q, cu_k, is_causal)


def efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout_p, custom_mask_type, *_, **__):
    """aten::_efficient_attention_forward over one batch [1, T, H, d] of packed rows."""
    out = _forward(q[0], k[0], v[0], cu_q, cu_k, custom_mask_type == 1)[None]
    unused = torch.zeros(())
    return out, q.new_zeros(len(cu_q) - 1, q.shape[2], max_q), unused, unused.clone(), max_q, max_k


def efficient_backward(grad, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, p, seed, offset, mask_type, *_, **__):
    """aten::_efficient_attention_backward: gradients of q, k, v, and of the bias that there is not."""
    return *(x[None] for x in _backward(grad[0], q[0], k[0], v[0], cu_q, cu_k, mask_type == 1)), torch.zeros(())


KERNELS = {
    "torch_attn::_varlen_attn": varlen,
    "torch_attn::_varlen_attn_backward": varlen_backward,
    "aten::_efficient_attention_forward": efficient,
    "aten::_efficient_attention_backward": efficient_backward,
}


def _runs(cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[slice, slice]]:
    bounds = zip(*(zip(cu.tolist(), cu.tolist()[1:], strict=False) for cu in (cu_q, cu_k)), strict=True)
    for (first_q, last_q), (first_k, last_k) in bounds:
        if last_q > first_q:
            yield slice(first_q, last_q), slice(first_k, last_k)


def _probabilities(q: Tensor, k: Tensor, causal: bool) -> Tensor:  # [Lq, H, d], [Lk, H, d] -> [H, Lq, Lk]
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> Tensor:
    out = torch.zeros_like(q)
    for of_q, of_k in _runs(cu_q, cu_k):
        shares = _probabilities(q[of_q], k[of_k], causal)
        out[of_q] = torch.einsum("hqk,khd->qhd", shares, v[of_k].float()).to(out.dtype)
    return out


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool):
    of = tuple(torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for of_q, of_k in _runs(cu_q, cu_k):
        shares, g = _probabilities(q[of_q], k[of_k], causal), grad[of_q].float()
        of[2][of_k] += torch.einsum("hqk,qhd->khd", shares, g)
        of_shares = torch.einsum("qhd,khd->hqk", g, v[of_k].float())
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        of[0][of_q] += torch.einsum("hqk,khd->qhd", of_scores, k[of_k].float())
        of[1][of_k] += torch.einsum("hqk,qhd->khd", of_scores, q[of_q].float())
    return tuple(x.to(like.dtype) for x, like in zip(of, (q, k, v), strict=True))
