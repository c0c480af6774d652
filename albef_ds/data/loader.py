"""Which loader a run gets, over which data; both kinds read both kinds of data and give the same samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch

from albef_ds.config import BatchPlan, Config, ConfigError, DataConfig
from albef_ds.data.annotations import Annotation, AnnotationError, read_pairs
from albef_ds.data.augment import TrainTransform
from albef_ds.data.batch import Loaded
from albef_ds.data.dali_pipeline import MISSING, dali_available
from albef_ds.data.order import SampleOrder
from albef_ds.data.shard_folder import CachedFolder, open_folder
from albef_ds.data.shard_format import ShardError
from albef_ds.data.shard_order import ShardOrder
from albef_ds.data.shards import ShardSet
from albef_ds.data.task_loader import build_samples
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.tokenizer import CaptionTokenizer, TokenizerError
from albef_ds.data.torch_loader import PretrainingSamples, TorchLoader, UnreadableImagesError

log = logging.getLogger(__name__)

USERS = (ConfigError, AnnotationError, ShardError, TokenizerError)  # these say already what is wrong with what


class TooManyRejectsError(UnreadableImagesError):
    """More samples could not be used than the recipe allows."""


class Loader(Protocol):
    order: SampleOrder

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch_of(self, step: int) -> int: ...

    def batches(self, start_step: int = 0) -> Iterator[Loaded]: ...


class TrainingLoader:
    """A loader that stops after too many rejects. `rejected`: (key, reason) of entries left out from the start."""

    def __init__(self, loader: Loader, max_rejects: int | None, rejected: Sequence[tuple[str, str]] = ()):
        self.loader, self.max_rejects, self.rejected = loader, max_rejects, tuple(rejected)
        self.order = loader.order

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        return self.loader.epoch_of(step)

    def batches(self, start_step: int = 0) -> Iterator[Loaded]:
        """Raises TooManyRejectsError once more than `max_rejects` different samples had to be replaced."""
        seen: set[str] = set()
        with closing(self.loader.batches(start_step)) as batches:
            for batch in batches:
                for key, reason in batch.rejected:
                    seen.add(key)
                    if self.max_rejects is not None and len(seen) > self.max_rejects:
                        raise TooManyRejectsError(
                            f"{len(seen)} samples cannot be used, the recipe allows {self.max_rejects} "
                            f"(data.max_rejects); the last one was {key}: {reason}"
                        )
                yield batch


def build_loader(
    config: Config, tokenizer: CaptionTokenizer, plan: BatchPlan, rank: int, world_size: int, device: torch.device
) -> TrainingLoader:
    """The loader that the recipe asks for, over the data it names.

    Raises ConfigError where the recipe contradicts itself, AnnotationError or ShardError where data cannot be read.
    """
    data = config.data
    numbers = {
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "rank": rank,
        "world_size": world_size,
        "seed": config.train.seed,
    }
    transform = TrainTransform(
        config.model.vision.image_size,
        scale=data.augment.crop_scale,
        horizontal_flip=data.augment.horizontal_flip,
        randaugment=data.augment.randaugment,
    )
    try:
        if config.task == "pretraining":
            pairs = open_data(data)
            order = order_of(pairs, data, numbers)
            text = TextPipeline(tokenizer, data.max_words, data.max_tokens, data.mlm_probability)
            if use_dali(data.loader):
                from albef_ds.data.dali import DaliLoader

                loader = DaliLoader(pairs, text, transform, order, workers=data.workers, device=device)
                return TrainingLoader(loader, data.max_rejects, getattr(pairs, "rejected", ()))
            samples, rejected = PretrainingSamples(pairs, text, transform), getattr(pairs, "rejected", ())
        else:
            samples = build_samples(config, tokenizer, transform)
            rejected, order = samples.entries.rejected, SampleOrder(len(samples), **numbers)
        loader = TorchLoader(samples, order, config.train.seed, data.workers, pin_memory=device.type == "cuda")
    except ValueError as error:
        raise error if isinstance(error, USERS) else ConfigError(f"data: {error}") from error
    return TrainingLoader(loader, data.max_rejects, rejected)


def open_data(data: DataConfig) -> Sequence[Annotation]:
    """What the recipe names: annotation files, or shards."""
    if data.train and data.shards:
        raise ConfigError("data.train and data.shards are both set: name annotation files or shards")
    if data.train:
        return read_pairs(data.train, data.image_root)
    if not data.shards:
        raise ConfigError("data.train and data.shards are empty: name the annotation files or the shards to train on")
    cache_bytes = int(data.cache_gb * 1e9)
    cache = None if data.cache_dir is None else Path(data.cache_dir)
    folders = [open_folder(location, cache, cache_bytes) for location in data.shards]
    shards = ShardSet(folders, data.on_bad_shard)
    _check_cache(shards, data.shuffle_buffer, cache_bytes)
    return shards


def order_of(samples: Sequence[Annotation], data: DataConfig, numbers: dict[str, int]) -> SampleOrder:
    if isinstance(samples, ShardSet):
        return ShardOrder.over(samples.corpora, data.weights, data.shuffle_buffer, **numbers)
    if data.weights:
        raise ValueError("weights are for shards: pack each corpus, or name an annotation file more than once")
    return SampleOrder(len(samples), **numbers)


def use_dali(wanted: str) -> bool:
    if wanted == "dali" and not dali_available():
        raise ConfigError(f"data.loader is dali: {MISSING}")
    if wanted == "auto" and not dali_available():
        log.info("NVIDIA DALI is not installed: images are decoded by Pillow in worker processes")
    return wanted != "torch" and dali_available()


def _check_cache(shards: ShardSet, buffer: int, cache_bytes: int) -> None:
    """The shards of one shuffle buffer are all in use at once: a smaller cache would fetch each many times."""
    needed = 0
    for folder, manifest in zip(shards.folders, shards.manifests, strict=True):
        if isinstance(folder, CachedFolder):
            largest = max(shard.bytes for shard in manifest.shards)
            needed += min(manifest.bytes, round(manifest.bytes / manifest.samples * buffer) + 2 * largest)
    if needed > cache_bytes:
        raise ConfigError(
            f"data.cache_gb is {cache_bytes / 1e9:g}: a shuffle buffer of {buffer} samples reads from shards of "
            f"{needed / 1e9:.3g} GB at a time; raise it, or lower data.shuffle_buffer"
        )
