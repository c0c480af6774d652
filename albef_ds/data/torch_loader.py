"""Batches of any task from image files, with Pillow and torch's DataLoader: runs anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from albef_ds.data.annotations import Annotation, AnnotationError
from albef_ds.data.batch import Loaded, PretrainingBatch
from albef_ds.data.images import ImageError, decode_image
from albef_ds.data.masking import MaskedText, pack_masked
from albef_ds.data.order import SampleOrder, sample_rng
from albef_ds.data.shard_format import ShardError
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.tokenizer import CaptionTokenizer, TokenizerError
from albef_ds.data.worker_processes import Raised, batches_of

MAX_REPLACEMENTS = 20

Transform = Callable[[Image.Image, np.random.Generator], Tensor]


class UnreadableImagesError(RuntimeError):
    """So many images in a row cannot be read that something is wrong with all of them."""


# What is wrong with what the user gave; their messages say so alone.
USERS = (UnreadableImagesError, AnnotationError, ShardError, TokenizerError)


def nothing_readable(rejected: Sequence[tuple[str, str]]) -> UnreadableImagesError:
    examples = "; ".join(f"{key}: {reason}" for key, reason in rejected[:3])
    return UnreadableImagesError(
        f"images cannot be read: {len(rejected)} drawn one after another all failed, such as {examples}; "
        "check that the paths in the annotations and the image root, or the shards, are right"
    )


class Samples(Protocol):
    """What a loader needs of a task's data. Pickled into the workers."""

    def __len__(self) -> int: ...

    def load(self, index: int, rng: np.random.Generator) -> object:
        """A sample, as a function of index and generator alone; ImageError, before anything is drawn, where an image
        cannot be used."""

    def collate(self, samples: list, *, rejected: tuple[tuple[str, str], ...], keys: tuple[str, ...]) -> Loaded: ...


@dataclass(frozen=True)
class _Indexed(Dataset):
    """(epoch, index) -> (sample, what could not be used in its place), or what was wrong with what the user gave."""

    samples: Samples
    seed: int

    def __getitem__(self, epoch_and_index: tuple[int, int]) -> tuple[object, list[tuple[str, str]]] | Raised:
        try:
            return self._load(*epoch_and_index)
        except USERS as error:
            return Raised(error)

    def _load(self, epoch: int, index: int) -> tuple[object, list[tuple[str, str]]]:
        rng = sample_rng(self.seed, epoch, index)
        rejected: list[tuple[str, str]] = []
        for _ in range(1 + MAX_REPLACEMENTS):
            try:
                return self.samples.load(index, rng), rejected
            except ImageError as error:
                rejected.append((error.key, error.reason))
            index = int(rng.integers(len(self.samples)))
        raise nothing_readable(rejected)

    def collate(self, loaded: list[tuple[object, list[tuple[str, str]]] | Raised]) -> Loaded | Raised:
        for raised in loaded:
            if isinstance(raised, Raised):
                return raised
        samples = [sample for sample, _ in loaded]
        return self.samples.collate(
            samples,
            rejected=tuple(r for _, rejected in loaded for r in rejected),
            keys=tuple(sample.key for sample in samples),
        )


class TorchLoader:
    """This rank's micro-batches, endlessly, from any optimiser step on.

    order: which samples a step has.
    workers: processes that prepare batches; 0: in this process. prefetch: batches each of them prepares ahead.

    Which samples a step has follows `SampleOrder`; everything random about a sample comes from (seed, epoch, index). So
    neither workers nor ranks nor where a run was interrupted change any batch, and the position is the step number.
    An image that cannot be read is replaced by another, and named in `batch.rejected`.

    While iterating it raises UnreadableImagesError where 20 replacements of one sample in a row cannot be read either.
    """

    def __init__(
        self,
        samples: Samples,
        order: SampleOrder,
        seed: int,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        self.order = order
        self._samples = _Indexed(samples, seed)
        self._workers = workers
        self._pin_memory = pin_memory and torch.cuda.is_available()  # there is nothing to pin for otherwise
        self._prefetch = prefetch if workers else None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps; samples that do not fill the last one are left out, others in each epoch."""
        return self.order.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """The epoch of optimiser step `step`, both counted from 0."""
        return self.order.epoch_of(step)

    def batches(self, start_step: int = 0) -> Iterator[Loaded]:
        """Endless micro-batches, `accumulation` of them a step, beginning with the first of `start_step`.

        Worker processes start here and live as long as the iterator, through all epochs.
        """
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: expected 0 or more")
        loader = DataLoader(
            self._samples,
            batch_sampler=_From(self.order, start_step),
            collate_fn=self._samples.collate,
            num_workers=self._workers,  # torch gives each of them a single thread
            pin_memory=self._pin_memory,
            prefetch_factor=self._prefetch,
            # Its own: from torch's global generator it would take a number, and shift the model's dropout.
            generator=torch.Generator(),
        )
        return batches_of(loader)


@dataclass(frozen=True)
class _From:
    """The DataLoader's batch sampler: the order from a step on."""

    order: SampleOrder
    start_step: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.order.micro_batches(self.start_step)


@dataclass(frozen=True)
class PretrainingSample:
    image: Tensor  # [3, R, R] float32
    text: MaskedText
    key: str


@dataclass(frozen=True)
class PretrainingSamples:
    """Image and captions to pixels and masked tokens."""

    annotations: Sequence[Annotation]
    text: TextPipeline
    transform: Transform

    def __len__(self) -> int:
        return len(self.annotations)

    def load(self, index: int, rng: np.random.Generator) -> PretrainingSample:
        annotation = self.annotations[index]
        image = decode_image(annotation.image, key=annotation.key)
        text = self.text(annotation.captions, rng)
        return PretrainingSample(self.transform(image, rng), text, annotation.key)

    def collate(self, samples: list[PretrainingSample], **loaded) -> PretrainingBatch:
        text, masked = pack_masked([sample.text for sample in samples])
        return PretrainingBatch(torch.stack([sample.image for sample in samples]), text, masked, **loaded)


class PretrainingLoader(TorchLoader):
    """A TorchLoader over image-caption pairs.

    annotations: a sequence of `Annotation`, see `read_pairs` and `ShardSet`.
    order: which samples a step has; None: `SampleOrder` over all annotations with the numbers given here.
    transform: (PIL RGB image, numpy Generator) -> [3, R, R] float32, see `TrainTransform`.
    micro_batch: samples of one rank in one forward pass; a step has micro_batch x accumulation x world_size.

    Raises ValueError where the data do not fill one global batch.
    """

    def __init__(
        self,
        annotations: Sequence[Annotation],
        tokenizer: CaptionTokenizer,
        transform: Transform,
        *,
        micro_batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        max_words: int = 30,
        max_tokens: int = 25,
        mlm_probability: float = 0.15,
        workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
        order: SampleOrder | None = None,
    ):
        order = order or SampleOrder(len(annotations), micro_batch, accumulation, rank, world_size, seed)
        text = TextPipeline(tokenizer, max_words, max_tokens, mlm_probability)
        samples = PretrainingSamples(annotations, text, transform)
        super().__init__(samples, order, seed, workers, pin_memory, prefetch)
