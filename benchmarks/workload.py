"""What the step benchmarks run on: model sizes, caption lengths, and batches that every rival gets alike."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from albef_ds.config import ModelConfig, TextConfig, VisionConfig
from albef_ds.data.batch import LabelledBatch, Movable, PackedText, PairBatch, PretrainingBatch, QuestionBatch
from albef_ds.data.masking import mask_tokens
from benchmarks import CAPTIONS, PRESETS

HISTOGRAM = Path(__file__).parent / "captions_histogram.json"
MAX_TOKENS = 25  # the reference cuts captions there while pre-training
MEAN_14 = (9, 10, 11, 12, 13, 15, 17, 25)  # 8 captions, 112 tokens, the longest full: what a padded batch looks like
MASKED = 0.15
ANSWERS = ([101, 7, 9, 102], [101, 8, 102], [101, 5, 5, 6, 102])  # of every question


def preset(name: str, dropout: float = 0.1) -> ModelConfig:
    """base: ViT-B/16 at 256 pixels and BERT-base, as published; small: a quarter as wide; tiny: for tests."""
    rates = {"dropout": dropout, "attention_dropout": dropout}
    if name == "base":
        return ModelConfig(vision=VisionConfig(image_size=256), text=TextConfig(vocab_size=30522, **rates))
    if name == "small":
        vision = VisionConfig(image_size=256, width=192, layers=12, heads=3)
        text = TextConfig(vocab_size=30522, width=192, heads=3, mlp_width=768, **rates)
        return ModelConfig(vision=vision, text=text, queue_size=8192)
    if name == "tiny":
        vision = VisionConfig(image_size=64, width=48, layers=2, heads=3)
        text = TextConfig(vocab_size=503, width=48, layers=4, fusion_layer=2, heads=3, mlp_width=96, **rates)
        return ModelConfig(vision=vision, text=text, embed_dim=32, queue_size=128)
    raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")


def lengths_of(captions: str, batch: int, seed: int = 0) -> list[int]:
    """Tokens of each of `batch` captions, by name of CAPTIONS.

    "mean14" is for whole eights of captions; "histogram" draws from captions_histogram.json.
    """
    if captions == "full":
        return [MAX_TOKENS] * batch
    if captions == "mean14":
        return [MEAN_14[i % len(MEAN_14)] for i in range(batch)]
    if captions != "histogram":
        raise ValueError(f"unknown captions {captions!r}; choose one of {', '.join(CAPTIONS)}")
    counts = json.loads(HISTOGRAM.read_text(encoding="utf-8"))["counts"]
    return random.Random(seed).choices([int(n) for n in counts], weights=list(counts.values()), k=batch)


def make_batch(config: ModelConfig, lengths: list[int], seed: int = 0) -> PretrainingBatch:
    """Random images, random words, masked as in training; on the CPU."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    vocabulary, pixels = config.text.vocab_size, config.vision.image_size
    cls_id, mask_id = (101, 103) if vocabulary > 1000 else (2, 4)
    texts = [[cls_id, *rng.integers(mask_id + 1, vocabulary, size=n - 1).tolist()] for n in lengths]
    text = PackedText.from_lists(texts)
    special = {"vocab_size": vocabulary, "mask_id": mask_id, "cls_id": cls_id, "pad_id": config.text.pad_token_id}
    masked = mask_tokens(text, rng, probability=MASKED, **special)
    images = torch.randn(len(lengths), 3, pixels, pixels, generator=generator)
    return PretrainingBatch(images, text, masked)


def task_batch(
    task: str, config: ModelConfig, lengths: Sequence[int], seed: int = 0, texts_an_image: int = 1
) -> Movable:
    """A micro-batch of any task, of texts of these lengths; on the CPU."""
    batch = make_batch(config, list(lengths), seed)
    images, text = batch.images, batch.text
    if task == "pretraining":
        return batch
    if task in ("retrieval", "grounding", "text_assignment"):
        return PairBatch(images, text, torch.arange(len(batch)) // 2)
    images = images[::texts_an_image]
    if task == "vqa":
        answers = PackedText.from_lists([*ANSWERS] * len(batch))
        counts = [len(ANSWERS)] * len(batch)
        return QuestionBatch.of(images, text, answers, torch.full((sum(counts),), 0.5), counts)
    if task == "nlvr":
        images = torch.cat([images, images])
    return LabelledBatch(images, text, torch.zeros(len(batch), dtype=torch.int64))


def captions_batch(config: ModelConfig, captions: str, batch: int, seed: int = 0) -> PretrainingBatch:
    return make_batch(config, lengths_of(captions, batch, seed), seed)
