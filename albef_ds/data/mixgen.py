"""MixGen (Hao et al., WACV 2023): new pairs out of two, images blended and texts joined. `model.options.mixgen`.

The first M samples of a micro-batch are each mixed with the sample M places on, which itself stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from albef_ds.data.batch import MaskedTokens, PackedText, PairBatch, PretrainingBatch

BLEND = 0.5  # lambda of the paper: the share of a sample's own image


def mixgen(batch: PretrainingBatch | PairBatch, share: float) -> PretrainingBatch | PairBatch:
    """The batch with its first int(share * B) pairs mixed; `batch` itself is left alone.

    Image i becomes BLEND * image i + (1 - BLEND) * image j, its text the tokens of i and then those of j without their
    [CLS]; masked tokens and their labels likewise. A pair keeps its id (that of i), key, and place.

    Everything happens where the batch lies. How large the result is the host knows, and so waits for no device.

    Args:
        share: of the pairs, 0 to 0.5 (the paper: 0.25); partners need as many again.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"model.options.mixgen is {share}: expected a share from 0 to 0.5, every pair needs a partner")
    mixed = int(share * len(batch))
    if mixed == 0:
        return batch
    masked = batch.masked if isinstance(batch, PretrainingBatch) else None
    joined = _Joined.of(batch.text, masked, mixed)
    images = torch.cat([batch.images[:mixed].lerp(batch.images[mixed : 2 * mixed], 1 - BLEND), batch.images[mixed:]])
    changed = {"images": images, "text": joined.pack(batch.text)}
    if masked is not None:
        changed["masked"] = joined.mask(masked)
    return replace(batch, **changed)


@dataclass(frozen=True)
class _Joined:
    """Where every token of the new texts comes from."""

    source: Tensor  # [T'] int64, the token of the old texts that stands there
    cu_seqlens: Tensor  # [B + 1] int64, of the new texts
    lengths: tuple[int, ...]  # of the new texts
    labelled: Tensor  # [T'] bool
    counts: tuple[int, ...]  # labels of each new text

    @classmethod
    def of(cls, text: PackedText, masked: MaskedTokens | None, mixed: int) -> _Joined:
        device = text.cu_seqlens.device
        host_lengths = _joined(text.lengths, mixed, less=1)  # the partner's [CLS] goes
        counts = () if masked is None else _joined(masked.counts, mixed)
        starts = text.cu_seqlens[:-1].long()
        lengths = text.cu_seqlens.long().diff()
        # A mixed text is two pieces, its own tokens and those of its partner behind [CLS]; any other is one piece.
        partner = slice(mixed, 2 * mixed)
        piece_starts = torch.cat([torch.stack([starts[:mixed], starts[partner] + 1], 1).flatten(), starts[mixed:]])
        piece_lengths = torch.cat([torch.stack([lengths[:mixed], lengths[partner] - 1], 1).flatten(), lengths[mixed:]])
        new_lengths = torch.cat([lengths[:mixed] + lengths[partner] - 1, lengths[mixed:]])

        flags = torch.zeros(text.num_tokens, dtype=torch.bool, device=device)
        if masked is not None:
            flags.index_fill_(0, masked.positions, True)
        tokens = sum(host_lengths)
        shift = piece_starts - F.pad(piece_lengths.cumsum(0), (1, 0))[:-1]
        source = torch.arange(tokens, device=device) + shift.repeat_interleave(piece_lengths, output_size=tokens)
        return cls(source, F.pad(new_lengths.cumsum(0), (1, 0)), host_lengths, flags[source], counts)

    def pack(self, text: PackedText) -> PackedText:
        tokens = self.source.numel()
        first = self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff(), output_size=tokens)
        position_ids = torch.arange(tokens, device=first.device) - first
        return PackedText(text.input_ids[self.source], position_ids, self.cu_seqlens.int(), self.lengths)

    def mask(self, masked: MaskedTokens) -> MaskedTokens:
        # A stable sort brings the labelled tokens to the front in order, their number being known; nonzero would wait.
        positions = (~self.labelled).long().argsort(stable=True)[: sum(self.counts)]
        labels = torch.zeros_like(masked.input_ids).index_copy(0, masked.positions, masked.labels)
        return MaskedTokens(masked.input_ids[self.source], positions, labels[self.source[positions]], self.counts)


def _joined(numbers: tuple[int, ...], mixed: int, less: int = 0) -> tuple[int, ...]:
    """What each new text has, where old text i has numbers[i]; a mixed one has `less` fewer than its two together."""
    partners = numbers[mixed : 2 * mixed]
    return (*(a + b - less for a, b in zip(numbers[:mixed], partners, strict=True)), *numbers[mixed:])
