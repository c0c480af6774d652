"""Retrieval at its edges: several captions an image, in the batch and in the queue; batches without any negative."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import PairBatch
from albef_ds.kernels import sample_hard_negatives
from albef_ds.tasks.retrieval import Retrieval
from tests.golden_cases import most_likely_negative
from tests.tiny import one_by_one, tiny_batch, tiny_model

PRIME = 13  # of the queue: no multiple of any batch


def build(sample_negatives=most_likely_negative, **changes) -> Retrieval:
    torch.manual_seed(0)
    return Retrieval(tiny_model(**{"queue_size": PRIME} | changes), sample_negatives)


def batch_of(ids: list[int], seed: int = 0, dtype=torch.float32) -> PairBatch:
    base = tiny_batch(len(ids), seed)
    return PairBatch(base.images.to(dtype), base.text, torch.tensor(ids))


def step(task: Retrieval, batch: PairBatch, alpha: float = 0.4) -> dict[str, torch.Tensor]:
    task.start_step(alpha)
    losses = task(batch)
    task.zero_grad()
    sum(losses.values()).backward()
    task.finish_step()
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    return {name: value.detach() for name, value in losses.items()}


def plain_losses(task: Retrieval, batch: PairBatch, alpha: float) -> dict[str, torch.Tensor]:
    """From the features: equal ids share the target, in the batch and in the queue; then pair by pair."""
    size, ids = len(batch), batch.ids
    image_embeds, image_feat = task.model.encode_image(batch.images)
    text_embeds, text_feat = task.model.encode_text(batch.text)
    _, image_feat_m = task.teacher.encode_image(batch.images)
    _, text_feat_m = task.teacher.encode_text(batch.text)
    right = (ids[:, None] == torch.cat([ids, task.queue.ids])[None]).double()
    right = right / right.sum(1, keepdim=True)
    losses, sims = [], []
    for feat, feat_m, bank in (
        (image_feat, image_feat_m, torch.cat([text_feat_m, task.queue.text])),
        (text_feat, text_feat_m, torch.cat([image_feat_m, task.queue.image])),
    ):
        logits, soft = feat @ bank.T / task.model.temp, (feat_m @ bank.T / task.model.temp).softmax(1)
        target = alpha * soft + (1 - alpha) * right
        losses.append(-(target * logits.log_softmax(1)).sum(1).mean())
        sims.append(logits[:, :size])
    wrong = ids[:, None] != ids[None]
    chosen = [sim.masked_fill(~wrong, float("-inf")).argmax(1).tolist() for sim in sims]
    exist = wrong.any(1).tolist()
    matched = [(i, i) for i in range(size)]
    unmatched = [(t, i) for i, t in enumerate(chosen[0]) if exist[i]] + [
        (t, i) for t, i in enumerate(chosen[1]) if exist[t]
    ]
    logits = one_by_one(task.model, text_embeds, batch.text, matched + unmatched, image_embeds)
    labels = torch.tensor([1] * len(matched) + [0] * len(unmatched))
    return {"itc": sum(losses) / 2, "itm": F.cross_entropy(logits, labels)}


def likeliest_or_none(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    wrong = ids[:, None] != ids[None]
    return torch.where(wrong.any(1), most_likely_negative(logits, ids), -1)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4))
def test_losses_over_batches_that_share_ids_with_the_queue(steps):
    task = build(likeliest_or_none).double().eval()
    held = [-100] * PRIME
    for number, ids in enumerate(steps):
        batch = batch_of(ids, seed=number, dtype=torch.float64)
        task.start_step(0.4)
        losses = task(batch)
        for name, expected in plain_losses(task, batch, 0.4).items():
            torch.testing.assert_close(losses[name].double(), expected, atol=1e-7, rtol=1e-7, msg=name)
        start = sum(map(len, steps[:number])) % PRIME
        task.finish_step()
        for i, value in enumerate(ids):
            held[(start + i) % PRIME] = value
        assert task.queue.ids.tolist() == held


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_a_negative_never_has_the_same_id(ids, seed):
    drawn = []

    def watched(logits, given_ids):
        chosen = sample_hard_negatives(logits, given_ids, generator=torch.Generator().manual_seed(seed))
        drawn.append((given_ids, chosen))
        return chosen

    losses = step(build(watched), batch_of(ids, seed))
    assert len(drawn) == 2 and all(torch.isfinite(value) for value in losses.values())
    for given_ids, chosen in drawn:
        assert given_ids.tolist() == ids
        for i, j in enumerate(chosen.tolist()):
            assert ids[j] != ids[i] if j >= 0 else len(set(ids)) == 1


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("ids", [[5], [7, 7], [2, 2, 2, 2, 2]])
def test_a_batch_of_one_id_learns_matching_from_its_own_pairs_alone(ids, impl):
    task = build(functools.partial(sample_hard_negatives, impl=impl))
    batch = batch_of(ids)
    image_embeds, _ = task.model.encode_image(batch.images)
    text_embeds, _ = task.model.encode_text(batch.text)
    own = torch.arange(len(ids))
    logits = task.model.match(text_embeds, batch.text, own, image_embeds, own)
    expected = F.cross_entropy(logits, torch.ones_like(own)).detach()
    losses = step(task, batch)
    torch.testing.assert_close(losses["itm"], expected)
    assert torch.isfinite(losses["itc"])


def test_a_skipped_step_leaves_queue_and_ids_alone():
    task = build()
    before = task.queue.image.clone()
    task.start_step(0.4)
    task(batch_of([1, 2, 1]))
    task.finish_step(applied=False)
    assert (task.queue.ids == -100).all() and task.queue.pointer.item() == 0
    assert torch.equal(task.queue.image, before)


def test_the_steps_features_of_all_micro_batches_enter_the_queue_in_order():
    task = build()
    task.start_step(0.4)
    task(batch_of([1, 2]))
    task(batch_of([3], seed=1))
    task.finish_step()
    assert task.queue.ids.tolist() == [1, 2, 3] + [-100] * (PRIME - 3)
