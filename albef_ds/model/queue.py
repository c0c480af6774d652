"""The momentum queues: the teacher's features of earlier batches, which ITC contrasts against."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """Two ring buffers [M, D], one of ids [M] where they are wanted, and one write pointer on the device.

    Stored row by row (the reference keeps [D, M]), so that a batch is written as one contiguous piece and the loss
    kernel reads whole features. Any length takes any batch: writing wraps round the end.
    """

    def __init__(self, length: int, width: int, keeps_ids: bool = False):
        super().__init__()
        if length < 1:
            raise ValueError(f"model.queue_size must be at least 1, got {length}")
        # As in the reference the queue starts as random unit vectors, which count as negatives from the first step.
        self.register_buffer("image", F.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("text", F.normalize(torch.randn(length, width), dim=1))
        # -100 is no image's id: what the queue starts with is nobody's positive (models/model_retrieval.py).
        self.register_buffer("ids", torch.full((length,), -100, dtype=torch.int64) if keeps_ids else None)
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @property
    def length(self) -> int:
        return self.image.shape[0]

    @torch.no_grad()
    def enqueue(self, image_feat: Tensor, text_feat: Tensor, ids: Tensor | None = None) -> None:
        """Overwrites the oldest rows with features [B, D], and ids [B], of all ranks; equal on every rank.

        Raises:
            ValueError: B exceeds the queue's length.
        """
        batch = image_feat.shape[0]
        if batch > self.length:
            raise ValueError(
                f"a batch of {batch} features does not fit the queue of {self.length}; raise model.queue_size"
            )
        rows = (self.pointer + torch.arange(batch, device=self.pointer.device)) % self.length
        self.image.index_copy_(0, rows, image_feat.to(self.image.dtype))
        self.text.index_copy_(0, rows, text_feat.to(self.text.dtype))
        if self.ids is not None:
            self.ids.index_copy_(0, rows, ids)
        self.pointer.add_(batch).remainder_(self.length)


@torch.no_grad()
def gather_features(
    image_feat: Tensor, text_feat: Tensor, ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, D] of this rank to [world * B, D] of all, in rank order, both in one collective; no gradient. Likewise ids
    [B], in a second one."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return image_feat, text_feat, ids
    world, (batch, width) = dist.get_world_size(), image_feat.shape
    local = torch.cat([image_feat, text_feat])  # [2 * B, D]
    gathered = local.new_empty(world * 2 * batch, width)
    dist.all_gather_into_tensor(gathered, local)
    images, texts = gathered.view(world, 2, batch, width).unbind(1)
    all_ids = None
    if ids is not None:
        all_ids = ids.new_empty(world * batch)
        dist.all_gather_into_tensor(all_ids, ids.contiguous())
    return images.flatten(0, 1), texts.flatten(0, 1), all_ids
