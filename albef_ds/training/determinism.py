"""`train.deterministic`: two runs of the same recipe on the same device and number of ranks give the same bits.

On a CPU they do without it. On a GPU it costs speed, and covers
- PyTorch's operations (torch.use_deterministic_algorithms; one that has no deterministic form raises an error and is
  named there), its attention kernels among them,
- flash-attn's backward pass, which is asked to add in one order (`model/attention.py`),
- cuBLAS (CUBLAS_WORKSPACE_CONFIG, which must be set before the first matrix product) and cuDNN.

This project's Triton kernels add in one order always. What still makes two runs differ:
- another kind of device, another number of ranks, or another version of PyTorch, CUDA or Triton: other orders of sums;
- `torch.compile` and Triton's autotuning where they choose by timing; a saved tuning cache settles the choice;
- NCCL, where NCCL_ALGO is left to it and topology changes between runs;
- a sample that could be read in one run and not in the other.
"""

from __future__ import annotations

import os

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def make_deterministic() -> None:
    """For this process; before anything computes on a GPU."""
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
