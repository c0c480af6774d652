"""Triton kernels of albef_ds, each beside its plain PyTorch form.

`queue_contrastive_loss` is the image-text contrastive loss against a queue of earlier features; `sample_hard_negatives`
draws the negatives of the matching loss. `impl="auto"` takes Triton for CUDA tensors and PyTorch for all others; Triton
is imported only when it is used. `oracle` holds the textbook form of each, the truth of the tests and benchmarks.
"""

from albef_ds.kernels.hard_negatives import sample_hard_negatives
from albef_ds.kernels.queue_contrastive import queue_contrastive_loss

__all__ = ["queue_contrastive_loss", "sample_hard_negatives"]
