"""Hard negatives for the matching loss, drawn without asking the host for anything.

A candidate j of row i is drawn with probability softmax(logits[i]) over the valid candidates, as the public ALBEF code
does with one `multinomial(...).item()` a row. Here all rows are drawn at once by an exponential race: with E_j
independent and exponential, argmax_j (logits_j - log E_j) has exactly that law, and logits need no normalising. A row
whose mass sits wholly on its own positive, on which `multinomial` fails, is nothing special.

The noise comes from PyTorch's generator in both implementations, so they draw the same candidates.
"""

import importlib.util

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def sample_hard_negatives(
    logits: Tensor, ids: Tensor | None = None, generator: torch.Generator | None = None, impl: str = "auto"
) -> Tensor:
    """One negative a row, with probability softmax(logits) over the row's valid candidates.

    Args:
        logits: [B, B] floating point, row i scores the candidates of sample i. Never differentiated.
        ids: [B] int64; a candidate with the row's own id is never drawn. None: only the row itself is excluded.
        generator: on the device of `logits`; None is PyTorch's default one there.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors, PyTorch for all others.

    Returns:
        [B] int64 indices of the candidates; -1 where a row has none, or only ones at -inf or NaN.

    Raises:
        TypeError: logits are not floating point or ids are not int64.
        ValueError: logits are not square, ids do not fit, devices differ, or `impl` is unknown or cannot run here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if logits.dim() != 2 or logits.shape[0] != logits.shape[1] or logits.shape[0] == 0:
        raise ValueError(f"logits must be [B, B] with B at least 1, got shape {list(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if ids is not None:
        if list(ids.shape) != [logits.shape[0]]:
            raise ValueError(f"ids has shape {list(ids.shape)}, expected [{logits.shape[0]}]")
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64, got {ids.dtype}")
        if ids.device != logits.device:
            raise ValueError(f"ids is on {ids.device}, logits on {logits.device}")
    if impl == "auto":
        impl = "triton" if logits.is_cuda and HAS_TRITON else "torch"
    noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).exponential_(generator=generator)
    return _op(logits.detach(), noise, ids, impl)


@torch.library.custom_op("albef_ds::hard_negatives", mutates_args=())
def _op(logits: Tensor, noise: Tensor, ids: Tensor | None, impl: str) -> Tensor:
    """[B] int64 winners of the race; `noise` [B, B] fp32 is exponential."""
    if impl == "triton":
        from albef_ds.kernels.hard_negatives_triton import race

        with torch.cuda.device_of(logits):
            return race(logits, noise, ids)
    lowest = float("-inf")
    # The smallest normal number: an exponential of exactly 0 would turn a candidate at -inf into NaN.
    scores = logits.float() - noise.clamp_min(torch.finfo(torch.float32).tiny).log()
    invalid = torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
    if ids is not None:
        invalid = invalid | (ids[:, None] == ids[None, :])
    best, winner = scores.masked_fill(invalid | scores.isnan(), lowest).max(dim=1)
    return torch.where(best > lowest, winner, -1)


@_op.register_fake
def _fake(logits, noise, ids, impl):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
