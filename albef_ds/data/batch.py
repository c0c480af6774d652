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

    def select(self, index: Tensor) -> PackedText:
        """Texts `index` [N] int64, in this order; one may come several times. Asks the device how long they are."""
        starts = self.cu_seqlens[index].long()
        lengths = self.cu_seqlens[index + 1].long() - starts
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        total = int(cu_seqlens[-1])
        shift = (starts - cu_seqlens[:-1]).repeat_interleave(lengths, output_size=total)
        rows = torch.arange(total, device=index.device) + shift
        return PackedText(self.input_ids[rows], self.position_ids[rows], cu_seqlens.int(), int(lengths.max()))

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
class Loaded(Movable):
    """What every micro-batch of one rank has, whatever its task."""

    images: Tensor  # [B, 3, R, R] float, normalised
    text: PackedText
    keys: tuple[str, ...] = field(default=(), kw_only=True)  # names of the samples, for logs
    # (key, reason) of samples replaced while loading
    rejected: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return self.text.num_texts


@dataclass(frozen=True)
class PretrainingBatch(Loaded):
    """Captions as they are, and masked."""

    masked: MaskedTokens


@dataclass(frozen=True)
class PairBatch(Loaded):
    """Images and captions; pairs of equal id are right for each other (retrieval, grounding)."""

    ids: Tensor  # [B] int64, 0 or more


@dataclass(frozen=True)
class LabelledBatch(Loaded):
    """Texts with a class each. Images [B, 3, R, R], or [2 B, 3, R, R], the left ones first (NLVR2)."""

    labels: Tensor  # [B] int64


@dataclass(frozen=True)
class QuestionBatch(Loaded):
    """`text` holds B questions; the answers to question 0 come first, then those to question 1, and so on."""

    answers: PackedText  # A of them, at least one a question
    weights: Tensor  # [A] float
    cu_questions: Tensor  # [B + 1] int32, the answers' tokens that belong to question i
    longest: int  # tokens of the question that has most

    @classmethod
    def of(
        cls,
        images: Tensor,
        questions: PackedText,
        answers: PackedText,
        weights: Tensor,
        counts: Sequence[int],
        **loaded,
    ) -> QuestionBatch:
        """counts: how many of the answers belong to each question. Raises ValueError where a question has none."""
        if len(counts) != questions.num_texts or min(counts) < 1 or sum(counts) != answers.num_texts:
            raise ValueError(
                f"{questions.num_texts} questions and {answers.num_texts} answers for counts {list(counts)}; "
                "every question needs an answer"
            )
        boundaries = torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0))
        cu_questions = answers.cu_seqlens[boundaries]
        return cls(images, questions, answers, weights, cu_questions, int(cu_questions.diff().max()), **loaded)
