"""What a loader's worker does for each fine-tuning task: an entry to pixels and tokens, samples to a batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from albef_ds.data.batch import LabelledBatch, Loaded, PackedText, PairBatch, QuestionBatch
from albef_ds.data.captions import clean_caption, clean_question
from albef_ds.data.images import decode_image
from albef_ds.data.task_entries import CaptionEntry, LabelledEntry, QuestionEntry
from albef_ds.data.tokenizer import CaptionTokenizer

Transform = Callable[[Image.Image, np.random.Generator], Tensor]


@dataclass(frozen=True)
class TaskSample:
    images: tuple[Tensor, ...]  # each [3, R, R]
    ids: list[int]  # the text's tokens
    entry: CaptionEntry | QuestionEntry | LabelledEntry
    answers: tuple[list[int], ...] = ()

    @property
    def key(self) -> str:
        return " ".join(self.entry.images)


@dataclass(frozen=True)
class TaskSamples:
    """Entries of one kind, as samples; the part that all tasks share.

    max_words, max_tokens: of the text; what is longer is cut.
    """

    entries: Sequence
    tokenizer: CaptionTokenizer
    transform: Transform
    max_words: int = 30
    max_tokens: int = 30

    def __len__(self) -> int:
        return len(self.entries)

    def load(self, index: int, rng: np.random.Generator) -> TaskSample:
        """Raises ImageError where an image cannot be used, before anything is drawn from `rng`."""
        entry = self.entries[index]
        return TaskSample(self.pixels(entry, rng), self.tokens(entry.text), entry, self.answers(entry))

    def pixels(self, entry, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """The entry's images, [3, R, R] each. Raises ImageError, before anything is drawn from `rng`."""
        images = [decode_image(path, key=key) for path, key in zip(self.paths(entry), entry.images, strict=True)]
        return tuple(self.transform(image, rng) for image in images)

    @staticmethod
    def paths(entry) -> tuple[str, ...]:
        return tuple(os.path.join(entry.root, image) for image in entry.images)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode([self.clean(text, self.max_words)], self.max_tokens)[0]

    clean = staticmethod(clean_caption)

    def answers(self, entry) -> tuple[list[int], ...]:
        return ()

    def collate(self, samples: list[TaskSample], **loaded) -> Loaded:
        raise NotImplementedError


@dataclass(frozen=True)
class GroupSample:
    """Several texts about one image."""

    samples: tuple[TaskSample, ...]  # the first of them has the image

    @property
    def key(self) -> str:
        return self.samples[0].key


@dataclass(frozen=True)
class TextsByImage:
    """Samples of one image's texts, `each` at a time, so that the image is read once for all of them; drawn anew every
    time, again where an image has fewer."""

    samples: TaskSamples
    each: int
    groups: tuple[np.ndarray, ...]  # numbers of the entries of each image

    @classmethod
    def over(cls, samples: TaskSamples, each: int) -> TextsByImage:
        groups: dict[tuple, list[int]] = {}
        for i, entry in enumerate(samples.entries):
            groups.setdefault((entry.root, entry.images), []).append(i)
        return cls(samples, each, tuple(np.array(group) for group in groups.values()))

    @property
    def entries(self) -> Sequence:
        return self.samples.entries

    def __len__(self) -> int:
        return len(self.groups)

    def load(self, index: int, rng: np.random.Generator) -> GroupSample:
        group, inner = self.groups[index], self.samples
        pixels = inner.pixels(inner.entries[int(group[0])], rng)
        drawn = rng.choice(group, self.each, replace=len(group) < self.each)
        entries = [inner.entries[int(i)] for i in drawn]
        texts = [TaskSample((), inner.tokens(e.text), e, inner.answers(e)) for e in entries]
        return GroupSample((replace(texts[0], images=pixels), *texts[1:]))

    def collate(self, groups: list[GroupSample], **loaded) -> Loaded:
        return self.samples.collate([sample for group in groups for sample in group.samples], **loaded)


def stacked(samples: Sequence[TaskSample]) -> Tensor:
    """[B, 3, R, R]; where samples have two images, all first ones and then all second ones. Samples without an image
    share that of the one before."""
    sides = zip(*(sample.images for sample in samples if sample.images), strict=True)
    return torch.stack([image for side in sides for image in side])


def texts_of(samples: Sequence[TaskSample]) -> PackedText:
    return PackedText.from_lists([sample.ids for sample in samples])


class PairSamples(TaskSamples):
    """Retrieval and grounding."""

    def collate(self, samples: list[TaskSample], **loaded) -> PairBatch:
        ids = torch.tensor([sample.entry.id for sample in samples])
        return PairBatch(stacked(samples), texts_of(samples), ids, **loaded)


class CaptionedSamples(PairSamples):
    """Text assignment: pre-training's pairs, one of an image's captions drawn each time. `entries`: of read_pairs."""

    def load(self, index: int, rng: np.random.Generator) -> TaskSample:
        pair = self.entries[index]
        image = decode_image(pair.image, key=pair.key)
        text = pair.captions[int(rng.integers(len(pair.captions)))]
        entry = CaptionEntry((pair.key,), "", text, index)
        return TaskSample((self.transform(image, rng),), self.tokens(text), entry)


class LabelledSamples(TaskSamples):
    """Visual entailment and NLVR2."""

    def collate(self, samples: list[TaskSample], **loaded) -> LabelledBatch:
        labels = torch.tensor([sample.entry.label for sample in samples])
        return LabelledBatch(stacked(samples), texts_of(samples), labels, **loaded)


class QuestionSamples(TaskSamples):
    """Visual question answering. An answer ends with [SEP], and is cut at max_tokens before it."""

    clean = staticmethod(clean_question)

    def answers(self, entry: QuestionEntry) -> tuple[list[int], ...]:
        return answer_ids(self.tokenizer, entry.answers, self.max_tokens)

    def collate(self, samples: list[TaskSample], **loaded) -> QuestionBatch:
        answers = [ids for sample in samples for ids in sample.answers]
        weights = torch.tensor([weight for sample in samples for weight in sample.entry.weights])
        counts = [len(sample.answers) for sample in samples]
        return QuestionBatch.of(
            stacked(samples), texts_of(samples), PackedText.from_lists(answers), weights, counts, **loaded
        )


def answer_ids(tokenizer: CaptionTokenizer, answers: Sequence[str], max_tokens: int) -> tuple[list[int], ...]:
    """`[CLS] answer [SEP]` of each, whatever the tokenizer does at the end of captions."""
    encoded = tokenizer.encode(answers, max_tokens)
    return tuple(ids if ids[-1] == tokenizer.sep_id else [*ids, tokenizer.sep_id] for ids in encoded)
