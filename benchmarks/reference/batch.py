"""A batch in the reference's form: texts padded to the longest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from albef_ds.data.batch import Movable, PretrainingBatch

IGNORED = -100  # label of a position that MLM does not predict


@dataclass(frozen=True)
class PaddedBatch(Movable):
    images: Tensor  # [B, 3, R, R] float
    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64, 1 where a token stands
    masked_ids: Tensor  # [B, L] int64, input_ids with masks in place
    labels: Tensor  # [B, L] int64, the id to predict, IGNORED elsewhere

    @classmethod
    def from_packed(cls, batch: PretrainingBatch, pad_id: int = 0) -> PaddedBatch:
        """The same images, ids and masks as our packed batch, padded to its longest text."""
        text = batch.text
        labels = torch.full_like(text.input_ids, IGNORED)
        labels[batch.masked.positions] = batch.masked.labels
        lengths = text.cu_seqlens.diff()
        places = torch.arange(text.max_length, device=lengths.device)
        here = places[None, :] < lengths[:, None]

        def pad(packed: Tensor, value: int) -> Tensor:
            return torch.full(here.shape, value, dtype=packed.dtype, device=packed.device).masked_scatter(here, packed)

        return cls(
            images=batch.images,
            input_ids=pad(text.input_ids, pad_id),
            attention_mask=here.long(),
            masked_ids=pad(batch.masked.input_ids, pad_id),
            labels=pad(labels, IGNORED),
        )

    def __len__(self) -> int:
        return self.images.shape[0]
