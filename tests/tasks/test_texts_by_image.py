"""Several texts of an image in a batch: the image is read once, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from albef_ds.build import build_task, with_vocabulary
from albef_ds.config import ConfigError, load_config, plan_batches
from albef_ds.data.augment import EvalTransform
from albef_ds.data.loader import build_loader
from albef_ds.data.task_samples import TextsByImage
from albef_ds.data.tokenizer import load_tokenizer
from tests.shapes_recipes import write_task_recipe

CPU = torch.device("cpu")


def recipe(folder, task: str, each: int, **train):
    path = write_task_recipe(folder, task)
    config = load_config(path, [f"data.texts_per_image={each}", *(f"train.{k}={v}" for k, v in train.items())])
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.sep_token)
    return with_vocabulary(config, tokenizer.vocab_size), tokenizer


def first_batch(config, tokenizer):
    loader = build_loader(config, tokenizer, plan_batches(config, 1), 0, 1, CPU)
    return next(loader.batches())


@pytest.mark.parametrize("task", ["vqa", "entailment", "nlvr"])
@pytest.mark.parametrize("each", [2, 3])
def test_the_loss_is_that_of_the_image_repeated_for_every_text(tmp_path, task, each):
    config, tokenizer = recipe(tmp_path, task, each)
    batch = first_batch(config, tokenizer)
    images = batch.images.shape[0]
    sides = 2 if task == "nlvr" else 1
    assert images == sides * config.train.micro_batch
    images //= sides
    assert batch.text.num_texts == each * images == len(batch)
    torch.manual_seed(0)
    learner = build_task(config).double().eval()  # without dropout
    learner.start_step(0.4)

    def loss_and_gradients(batch):
        learner.zero_grad()
        loss = sum(learner(batch).values())
        loss.backward()
        return loss.item(), [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]

    once = replace(batch, images=batch.images.double())
    repeated = replace(once, images=once.images.repeat_interleave(each, 0))
    loss, gradients = loss_and_gradients(once)
    expected, their_gradients = loss_and_gradients(repeated)
    assert loss == pytest.approx(expected, rel=1e-10)
    for mine, theirs in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


def test_an_epoch_goes_over_images_and_texts_are_drawn_without_repetition_where_there_are_enough(tmp_path):
    config, tokenizer = recipe(tmp_path, "entailment", 2)
    loader = build_loader(config, tokenizer, plan_batches(config, 1), 0, 1, CPU)
    groups = loader.loader._samples.samples
    assert isinstance(groups, TextsByImage)
    assert sorted(int(i) for group in groups.groups for i in group) == list(range(len(groups.entries)))
    assert loader.steps_per_epoch == len(groups) // config.train.global_batch
    fewest = min(len(group) for group in groups.groups)
    for index in range(len(groups)):
        sample = groups.load(index, np.random.default_rng(index))
        texts = [s.entry.text for s in sample.samples]
        assert len({s.entry.images for s in sample.samples}) == 1 and len(texts) == 2
    more = replace(groups, each=fewest + 1)
    assert len(more.load(0, np.random.default_rng(0)).samples) == fewest + 1  # some text twice
    assert [s.entry for s in groups.load(0, np.random.default_rng(5)).samples] == [
        s.entry for s in groups.load(0, np.random.default_rng(5)).samples
    ]


def test_other_tasks_say_that_they_do_not_share_images(tmp_path):
    config, tokenizer = recipe(tmp_path, "grounding", 2)
    with pytest.raises(ConfigError, match="texts_per_image is for vqa, entailment, nlvr, not for grounding"):
        first_batch(config, tokenizer)


def test_texts_that_do_not_divide_over_the_images_are_refused(tmp_path):
    config, tokenizer = recipe(tmp_path, "entailment", 3)
    batch = first_batch(config, tokenizer)
    learner = build_task(config)
    learner.start_step(0.0)
    with pytest.raises(ValueError, match="do not divide over"):
        learner(replace(batch, images=batch.images[:2]))


def test_the_image_that_is_read_is_that_of_its_texts(tmp_path):
    config, tokenizer = recipe(tmp_path, "vqa", 2)
    loader = build_loader(config, tokenizer, plan_batches(config, 1), 0, 1, CPU)
    groups = loader.loader._samples.samples
    groups = replace(groups, samples=replace(groups.samples, transform=EvalTransform(32)))
    sample = groups.load(3, np.random.default_rng(0))
    alone = groups.samples.load(int(groups.groups[3][-1]), None)
    assert torch.equal(sample.samples[0].images[0], alone.images[0])
