"""Packed runs for tests of attention, and attention by its definition."""

from __future__ import annotations

import torch

from albef_ds.model.spans import Spans


def spans_of(lengths: list[int], bound: int | None = None) -> Spans:
    """bound: what the host knows of the longest, where that is not its length."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return Spans(cu_seqlens, bound or max(lengths), sum(lengths))


def by_hand(q, k, v, q_lengths, k_lengths, causal=False):
    """Run by run, straight from the definition, in fp64."""
    out, q0, k0 = [], 0, 0
    for nq, nk in zip(q_lengths, k_lengths, strict=True):
        qi, ki, vi = (t.double().transpose(0, 1) for t in (q[q0 : q0 + nq], k[k0 : k0 + nk], v[k0 : k0 + nk]))
        scores = qi @ ki.transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.arange(nk) > torch.arange(nq)[:, None], -torch.inf)
        out.append((scores.softmax(-1) @ vi).transpose(0, 1))
        q0, k0 = q0 + nq, k0 + nk
    return torch.cat(out)
