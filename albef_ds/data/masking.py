"""Chooses the tokens of masked language modelling, and what stands in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from albef_ds.data.batch import MaskedTokens, PackedText


@dataclass(frozen=True)
class MaskedText:
    """One text before it is packed: its L ids, and what the masking did to them."""

    input_ids: np.ndarray  # [L] int64, the original ids
    masked_ids: np.ndarray  # [L] int64, with masks in place
    positions: np.ndarray  # [P] int64, indices into the L tokens, increasing

    @property
    def labels(self) -> np.ndarray:  # [P] int64
        return self.input_ids[self.positions]


def mask_ids(
    input_ids: Sequence[int] | np.ndarray,
    rng: np.random.Generator,
    *,
    probability: float,
    vocab_size: int,
    mask_id: int,
    cls_id: int,
    pad_id: int,
) -> MaskedText:
    """Masks the ids [L] of a text: each but [CLS] and [PAD] is chosen with `probability`.

    Of the chosen ones 80 % become [MASK], 10 % a word drawn from the whole vocabulary, 10 % stay (all are labels).
    None may be chosen. How many random numbers are drawn depends on L alone. Source: mask() in models/model_pretrain.py
    of the reference.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    draws = rng.random((3, ids.size))
    words = rng.integers(vocab_size, size=ids.size)
    chosen = (draws[0] < probability) & (ids != cls_id) & (ids != pad_id)
    to_mask = chosen & (draws[1] < 0.8)
    to_word = chosen & ~to_mask & (draws[2] < 0.5)
    masked = np.where(to_mask, mask_id, np.where(to_word, words, ids))
    return MaskedText(ids, masked, np.flatnonzero(chosen))


def mask_tokens(
    text: PackedText,
    rng: np.random.Generator,
    *,
    probability: float,
    vocab_size: int,
    mask_id: int,
    cls_id: int,
    pad_id: int,
) -> MaskedTokens:
    """Masks a batch of packed texts, on the host, with one generator; `mask_ids` says by which rule."""
    masked = mask_ids(
        text.input_ids.numpy(),
        rng,
        probability=probability,
        vocab_size=vocab_size,
        mask_id=mask_id,
        cls_id=cls_id,
        pad_id=pad_id,
    )
    return MaskedTokens.of(text, torch.from_numpy(masked.masked_ids), torch.from_numpy(masked.positions))


def pack_masked(texts: Sequence[MaskedText]) -> tuple[PackedText, MaskedTokens]:
    """Packs texts that were masked one by one, so that a sample's masks do not depend on its batch."""
    packed = PackedText.from_lists([text.input_ids.tolist() for text in texts])
    starts = packed.cu_seqlens[:-1].tolist()
    masked = MaskedTokens(
        input_ids=torch.from_numpy(np.concatenate([text.masked_ids for text in texts])),
        positions=torch.from_numpy(np.concatenate([s + t.positions for s, t in zip(starts, texts, strict=True)])),
        labels=torch.from_numpy(np.concatenate([text.labels for text in texts])),
        counts=tuple(len(text.positions) for text in texts),
    )
    return packed, masked
