"""Entailment, and what it shares with NLVR2: the packed pass against a padded one, the teacher's part in the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import LabelledBatch
from albef_ds.tasks.entailment import LABELS, Entailment
from albef_ds.tasks.nlvr import NLVR
from tests.plain_bert import PlainEncoder
from tests.tiny import tiny_batch, tiny_model


def build(kind=Entailment, **changes):
    torch.manual_seed(0)
    task = kind(tiny_model(**changes))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task.double().eval()


def batch_of(task, lengths: list[int], seed: int = 0) -> LabelledBatch:
    """Texts of these lengths, each with as many images as the task has."""
    base = tiny_batch(len(lengths), seed, lengths)
    images = [base.images, tiny_batch(len(lengths), seed + 1000).images][: task.images_per_text]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(task.classes, (len(lengths),), generator=generator)
    return LabelledBatch(torch.cat(images).double(), base.text, labels)


def plain_logits(network, batch: LabelledBatch) -> torch.Tensor:
    images = network.visual_encoder.forward_features(batch.images)
    hidden, _ = PlainEncoder.like(network.text_encoder)(batch.text, *images.split(len(batch)))
    first, _, second = network.cls_head
    return F.linear(F.linear(hidden[:, 0], first.weight, first.bias).relu(), second.weight, second.bias)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from([Entailment, NLVR]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_packed_loss_is_the_padded_one(kind, lengths, alpha, seed):
    task = build(kind)
    task.alpha = alpha
    batch = batch_of(task, lengths, seed)
    logits = plain_logits(task.model, batch)
    torch.testing.assert_close(task.model.classify(batch.images, batch.text), logits, atol=1e-7, rtol=1e-7)
    log_p, soft = logits.log_softmax(-1), plain_logits(task.teacher, batch).softmax(-1)
    hard = -log_p[torch.arange(len(lengths)), batch.labels].mean()
    expected = (1 - alpha) * hard - alpha * (soft * log_p).sum(-1).mean()
    torch.testing.assert_close(task(batch)["classes"], expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", [Entailment, NLVR])
def test_every_parameter_gets_a_gradient_and_the_teacher_follows_by_momentum(kind):
    task = build(kind, momentum=0.9).train()
    before = [p.clone() for p in task.teacher.parameters()]
    student = [p.clone() for part in task.teacher.PARTS for p in getattr(task.model, part).parameters()]
    task.start_step(0.4)
    task(batch_of(task, [3, 1, 7]))["classes"].backward()
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for now, then, theirs in zip(task.teacher.parameters(), before, student, strict=True):
        assert now.grad is None
        torch.testing.assert_close(now, 0.9 * then + 0.1 * theirs)


@pytest.mark.parametrize("kind", [Entailment, NLVR])
def test_without_distillation_there_is_no_teacher_and_alpha_does_nothing(kind):
    task = build(kind, distill=False)
    assert task.teacher is None
    batch, losses = batch_of(task, [3, 4]), []
    for alpha in (0.0, 1.0):
        task.start_step(alpha)
        losses.append(task(batch)["classes"])
        task.finish_step()
    expected = F.cross_entropy(task.model.classify(batch.images, batch.text), batch.labels)
    assert losses[0] == losses[1] == expected


@pytest.mark.parametrize("distill", [True, False])
def test_accuracy_is_measured_where_it_is_wanted(distill):
    task = build(distill=distill)
    batch = batch_of(task, [3, 4, 2, 6])
    found = task.model.classify(batch.images, batch.text).argmax(-1)
    labels = torch.where(torch.tensor([True, False, True, True]), found, (found + 1) % len(LABELS))
    batch = LabelledBatch(batch.images, batch.text, labels)
    task.start_step(0.4)
    task(batch)
    assert not task.measures
    task.start_step(0.4, measuring=True)
    task(batch)
    assert task.measures["accuracy"].item() == pytest.approx(0.75)
