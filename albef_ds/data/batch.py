"""The typed objects that a loader hands to a training step: images, and texts packed end to end without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


class Movable:
    """Moves every tensor field (and nested movable) to a device, or into pinned memory."""

    def _map(self, fn):
        changed = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = fn(value)
            elif isinstance(value, Movable):
                changed[f.name] = value._map(fn)
        return replace(self, **changed)

    def to(self, device, non_blocking: bool = True):
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def record_stream(self, stream) -> None:
        """Tells CUDA's allocator that `stream` uses every tensor here."""
        self._map(lambda t: (t.record_stream(stream), t)[1])

    def pin_memory(self):  # torch's DataLoader calls this on custom batch types
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class PackedText(Movable):
    """B texts of T tokens in all, one after another.

    `max_length` is a host number, so that nothing on the device needs to be asked for it.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, 0 at the start of each text
    cu_seqlens: Tensor  # [B + 1] int32, text i is tokens cu_seqlens[i] : cu_seqlens[i + 1]
    max_length: int

    @property
    def num_texts(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @classmethod
    def from_lists(cls, token_lists: Sequence[Sequence[int]]) -> PackedText:
        """Packs token id lists. Raises ValueError where one is empty: a text has at least its [CLS]."""
        lengths = [len(tokens) for tokens in token_lists]
        if not lengths or min(lengths) == 0:
            raise ValueError("a batch needs at least one text, and every text at least one token ([CLS])")
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return cls(
            input_ids=torch.tensor([t for tokens in token_lists for t in tokens], dtype=torch.int64),
            position_ids=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int64),
            cu_seqlens=cu_seqlens,
            max_length=max(lengths),
        )

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> PackedText:
        """Packs padded ids [B, L] with a 0/1 mask [B, L] whose ones come first in each row."""
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return cls.from_lists(rows)


@dataclass(frozen=True)
class MaskedTokens(Movable):
    """Masked language modelling over a PackedText: what replaces its ids, and what is to be guessed.

    Positions are host-counted (P is known without asking the device), so the MLM head runs on them alone.
    """

    input_ids: Tensor  # [T] int64, the ids with masks in place
    positions: Tensor  # [P] int64, indices into the T packed tokens
    labels: Tensor  # [P] int64, the original ids there


@dataclass(frozen=True)
class PretrainingBatch(Movable):
    """What one pre-training micro-batch of one rank consists of."""

    images: Tensor  # [B, 3, R, R] float, normalised
    text: PackedText
    masked: MaskedTokens
    keys: tuple[str, ...] = ()  # names of the samples, for logs
    rejected: tuple[tuple[str, str], ...] = field(default=())  # (key, reason) of samples replaced while loading

    def __len__(self) -> int:
        return self.images.shape[0]
