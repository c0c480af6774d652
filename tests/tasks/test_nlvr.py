"""Two images a text: which layer looks at which, what the layers share, and the text assignment that prepares them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import PairBatch
from albef_ds.tasks.nlvr import NLVR, Assignment, TextAssignment, draw_assignment
from tests.plain_bert import PlainEncoder
from tests.tiny import tiny_batch, tiny_model


def pairs(lengths: list[int], seed: int = 0) -> PairBatch:
    base = tiny_batch(len(lengths), seed, lengths)
    return PairBatch(base.images.double(), base.text, torch.arange(len(lengths)))


def build(assign=None) -> TextAssignment:
    torch.manual_seed(0)
    task = TextAssignment(tiny_model(), assign)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task.double().eval()


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 10), min_size=3, max_size=6), seed=st.integers(0, 99))
def test_text_assignment_is_what_a_padded_computation_gives(data, lengths, seed):
    size = len(lengths)
    index = st.lists(st.integers(0, size - 1), min_size=size, max_size=size)
    left, right, labels = (torch.tensor(data.draw(index)) for _ in range(3))
    labels = labels % 3
    task, batch = build(lambda sims: Assignment(left, right, labels)), pairs(lengths, seed)
    images = task.model.visual_encoder.forward_features(batch.images)
    hidden, _ = PlainEncoder.like(task.model.text_encoder)(batch.text, images[left], images[right])
    logits = F.linear(hidden[:, 0], task.model.ta_head.weight, task.model.ta_head.bias)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(task(batch)["ta"], expected, atol=1e-7, rtol=1e-7)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(3, 12), seed=st.integers(0, 10_000))
def test_a_drawn_assignment_says_the_truth(size, seed):
    torch.manual_seed(seed)
    drawn = draw_assignment(torch.randn(size, size) * 5)
    own = torch.arange(size)
    assert ((drawn.left == own) == (drawn.labels == 0)).all()
    assert ((drawn.right == own) == (drawn.labels == 1)).all()
    assert (drawn.left != drawn.right).all()  # two different images, also where neither is its own
    assert drawn.labels.min() >= 0 and drawn.labels.max() <= 2


def test_similar_images_are_drawn_more_often_and_all_labels_equally():
    torch.manual_seed(0)
    sims = torch.tensor([0.0, 3.0, 0.0, 0.0]).log1p().expand(4, 4)  # image 1 has four times the weight of another
    others, labels = torch.zeros(4, 4), torch.zeros(3)
    draws = 3000
    for _ in range(draws):
        drawn = draw_assignment(sims)
        other = torch.where(drawn.labels == 0, drawn.right, drawn.left)
        others[torch.arange(4), other] += 1
        labels += torch.bincount(drawn.labels, minlength=3)
    torch.testing.assert_close(labels / labels.sum(), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    # The first of the others: probability softmax(similarities) over all but the own one.
    expected = torch.tensor([[0, 4, 1, 1], [1, 0, 1, 1], [1, 4, 0, 1], [1, 4, 1, 0]]).float()
    torch.testing.assert_close(others / draws, expected / expected.sum(1, keepdim=True), atol=0.04, rtol=0)


@pytest.mark.parametrize("size", [1, 2])
def test_too_few_samples_for_two_other_images_are_named(size):
    with pytest.raises(ValueError, match=f"needs at least 3 samples a forward pass, got {size}; raise micro_batch"):
        build()(pairs([3] * size))


def test_text_assignment_trains_all_but_the_projection_that_finds_similar_images():
    task = build().train()
    task.start_step(0.4)
    task(pairs([3, 5, 2, 4]))["ta"].backward()
    without = {name for name, parameter in task.model.named_parameters() if parameter.grad is None}
    assert without == {"vision_proj.weight", "vision_proj.bias"}
    assert task.teacher is None
    task.finish_step()


@torch.no_grad()
def test_left_and_right_are_told_apart():
    torch.manual_seed(0)
    task = NLVR(tiny_model()).double().eval()
    batch = pairs([4, 6])
    other = pairs([4, 6], seed=5)
    one = task.model.classify(torch.cat([batch.images, other.images]), batch.text)
    two = task.model.classify(torch.cat([other.images, batch.images]), batch.text)
    assert not torch.allclose(one, two)
    # Each sample looks at its own two images alone.
    alone = task.model.classify(torch.cat([batch.images[1:], other.images[1:]]), batch.text.select(torch.tensor([1])))
    torch.testing.assert_close(alone, one[1:])
