"""The exponential race of `hard_negatives.py` in one launch: mask, race and winner, no [B, B] temporary."""

import torch
import triton
import triton.language as tl

from albef_ds.kernels import launch


def race(logits, noise, ids):
    """[B] int64 winners of the rows of logits [B, B] against exponential noise [B, B]; see `hard_negatives.py`."""
    launch.check_device(logits.device)
    batch = logits.shape[0]
    winners = torch.empty(batch, dtype=torch.int64, device=logits.device)
    ids_or_any = ids.contiguous() if ids is not None else noise
    block = min(1024, max(16, triton.next_power_of_2(batch)))
    _race[(batch,)](logits, noise, ids_or_any, winners, batch, *logits.stride(), HAS_IDS=ids is not None, BLOCK=block)
    return winners


@triton.jit
def _race(logits, noise, ids, winners, B, stride_row, stride_column, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row. Ties go to the first candidate; NaN never wins; -1 where every score is -inf."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    scores = tl.full((BLOCK,), float("-inf"), tl.float32)
    winner = tl.full((BLOCK,), -1, tl.int64)
    if HAS_IDS:
        own = tl.load(ids + row)
    for start in range(0, B, BLOCK):
        j = start + columns
        valid = (j < B) & (j != row)
        if HAS_IDS:
            valid = valid & (tl.load(ids + j, mask=j < B, other=0) != own)
        logit = tl.load(logits + row * stride_row + j.to(tl.int64) * stride_column, mask=valid, other=0.0)
        # The smallest normal number: an exponential of exactly 0 would turn a candidate at -inf into NaN.
        wait = tl.maximum(tl.load(noise + row * B + j, mask=valid, other=1.0), 1.1754943508222875e-38)
        score = logit.to(tl.float32) - tl.log(wait)
        better = valid & (score > scores)  # false for NaN and for -inf
        scores = tl.where(better, score, scores)
        winner = tl.where(better, j.to(tl.int64), winner)
    best = tl.max(scores, 0)
    last = 0x7FFFFFFFFFFFFFFF
    first = tl.min(tl.where((scores == best) & (winner >= 0), winner, last), 0)
    tl.store(winners + row, tl.where(first == last, -1, first))
