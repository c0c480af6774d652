"""The typed objects that a loader hands to a training step: images, and texts packed end to end without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate

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

    How long each is the host knows too, so that nothing on the device needs to be asked for it.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, 0 at the start of each text
    cu_seqlens: Tensor  # [B + 1] int32, text i is tokens cu_seqlens[i] : cu_seqlens[i + 1]
    lengths: tuple[int, ...]  # of the B texts, on the host

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def num_texts(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @classmethod
    def from_lists(cls, token_lists: Sequence[Sequence[int]]) -> PackedText:
        """Packs token id lists. Raises ValueError where one is empty: a text has at least its [CLS]."""
        lengths = tuple(len(tokens) for tokens in token_lists)
        if not lengths or min(lengths) == 0:
            raise ValueError("a batch needs at least one text, and every text at least one token ([CLS])")
        return cls(
            input_ids=torch.tensor([t for tokens in token_lists for t in tokens], dtype=torch.int64),
            position_ids=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int64),
            cu_seqlens=torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32),
            lengths=lengths,
        )

    def select(self, index: Sequence[int] | Tensor) -> PackedText:
        """Texts `index` [N], in this order; one may come several times. Waits for no device, unless `index` is a tensor
        there."""
        index = index.tolist() if isinstance(index, Tensor) else index
        lengths, device = tuple(self.lengths[i] for i in index), self.input_ids.device
        rows = to_device(self.rows_of(index), device)
        cu_seqlens = to_device(torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32), device)
        return PackedText(self.input_ids[rows], self.position_ids[rows], cu_seqlens, lengths)

    def rows_of(self, index: Sequence[int]) -> Tensor:
        """[T'] int64 on the host: where the tokens of texts `index` stand, text by text."""
        return torch.tensor([row for i in index for row in range(self._starts[i], self._starts[i + 1])])

    def without_last(self) -> tuple[PackedText, Tensor]:
        """The texts without their last tokens, and [P] int64 where the P tokens that stay stand in this one.

        Waits for no device. Raises ValueError where a text has no other token.
        """
        if min(self.lengths) < 2:
            raise ValueError(f"text {self.lengths.index(1)} has one token: without its last it would have none")
        device = self.input_ids.device
        starts = zip(self._starts, self.lengths, strict=False)
        rows = to_device(torch.tensor([row for i, n in starts for row in range(i, i + n - 1)]), device)
        cu_seqlens = self.cu_seqlens - torch.arange(self.num_texts + 1, dtype=torch.int32, device=device)
        lengths = tuple(n - 1 for n in self.lengths)
        return PackedText(self.input_ids[rows], self.position_ids[rows], cu_seqlens, lengths), rows

    @cached_property
    def _starts(self) -> tuple[int, ...]:  # cu_seqlens on the host
        return tuple(accumulate(self.lengths, initial=0))

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> PackedText:
        """Packs padded ids [B, L] with a 0/1 mask [B, L] whose ones come first in each row."""
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return cls.from_lists(rows)


@dataclass(frozen=True)
class MaskedTokens(Movable):
    """Masked language modelling over a PackedText: what replaces its ids, and what is to be guessed.

    Positions are host-counted (P is known without asking the device), so the MLM head runs on them alone. A text's
    first token, [CLS], is never among them.
    """

    input_ids: Tensor  # [T] int64, the ids with masks in place
    positions: Tensor  # [P] int64, indices into the T packed tokens, increasing
    labels: Tensor  # [P] int64, the original ids there
    counts: tuple[int, ...]  # labels of each of the B texts, on the host

    @classmethod
    def of(cls, text: PackedText, input_ids: Tensor, positions: Tensor) -> MaskedTokens:
        """Over a text that still lies on the host: `input_ids` [T] in place of its own, which are the labels at
        `positions` [P]."""
        texts = torch.searchsorted(text.cu_seqlens[1:].long(), positions, right=True)
        counts = tuple(torch.bincount(texts, minlength=text.num_texts).tolist())
        return cls(input_ids, positions, text.input_ids[positions], counts)


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


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies without waiting for the device: from pinned memory, which alone a GPU reads by itself."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
