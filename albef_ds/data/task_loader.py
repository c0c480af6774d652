"""The training samples of a fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Mapping

from albef_ds.config import Config, ConfigError
from albef_ds.data.annotations import read_pairs
from albef_ds.data.augment import TrainTransform
from albef_ds.data.task_entries import captions_by_id, hypotheses, phrases, questions, read_entries, statements
from albef_ds.data.task_samples import (
    CaptionedSamples,
    LabelledSamples,
    PairSamples,
    QuestionSamples,
    TaskSamples,
    TextsByImage,
)
from albef_ds.data.tokenizer import CaptionTokenizer

SHARE_IMAGES = ("vqa", "entailment", "nlvr")


def build_samples(config: Config, tokenizer: CaptionTokenizer, transform: TrainTransform) -> TaskSamples | TextsByImage:
    """Reads data.train as the task wants it.

    Raises:
        ConfigError: the recipe names no annotation files, or shards, which only pre-training reads.
        AnnotationError: a file that cannot be read as such.
    """
    data, task = config.data, config.task
    if data.shards:
        raise ConfigError(f"data.shards is set, but {task} reads annotation files: name them in data.train")
    if not data.train:
        raise ConfigError(f"data.train is empty: name the annotation files to train {task} on")
    text = {"max_words": data.max_words, "max_tokens": data.max_tokens}
    if task == "text_assignment":
        return CaptionedSamples(read_pairs(data.train, data.image_root), tokenizer, transform, **text)
    kind, parse = {
        "retrieval": (PairSamples, captions_by_id()),
        "grounding": (PairSamples, phrases()),
        "vqa": (QuestionSamples, questions(data.vg_weight)),
        "entailment": (LabelledSamples, hypotheses()),
        "nlvr": (LabelledSamples, statements()),
    }[task]
    samples = kind(read_entries(data.train, parse, image_roots(config)), tokenizer, transform, **text)
    if data.texts_per_image == 1:
        return samples
    if task not in SHARE_IMAGES:
        raise ConfigError(f"data.texts_per_image is for {', '.join(SHARE_IMAGES)}, not for {task}")
    return TextsByImage.over(samples, data.texts_per_image)


def image_roots(config: Config) -> Mapping[str, str | None]:
    return {"": config.data.image_root, **config.data.image_roots}
