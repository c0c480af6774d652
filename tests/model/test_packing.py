"""The packed fusion pass equals attending pair by pair, whatever the pairs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.model.albef import ALBEF, text_spans
from albef_ds.model.packing import FusionPlan
from tests.tiny import one_by_one, tiny_batch, tiny_model


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    images=st.integers(1, 4),
    picks=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=9),
    seed=st.integers(0, 9),
)
def test_packed_pairs_equal_single_pairs(lengths, images, picks, seed):
    torch.manual_seed(seed)
    model = ALBEF(tiny_model()).double()
    batch = tiny_batch(len(lengths), seed, lengths)
    pairs = [(t % len(lengths), i % images) for t, i in picks]
    text_embeds = torch.randn(batch.text.num_tokens, 24, dtype=torch.float64, requires_grad=True)
    image_embeds = torch.randn(images, 5, 24, dtype=torch.float64, requires_grad=True)
    index = torch.tensor(pairs)
    packed = model.match(text_embeds, batch.text, index[:, 0], image_embeds, index[:, 1])
    single = one_by_one(model, text_embeds, batch.text, pairs, image_embeds)
    torch.testing.assert_close(packed, single, atol=1e-10, rtol=1e-8)
    inputs = [text_embeds, image_embeds, model.text_encoder.fusion_layers[0].crossattention.self.key.weight]
    weight = torch.randn_like(packed)
    for found, wanted in zip(
        torch.autograd.grad((packed * weight).sum(), inputs),
        torch.autograd.grad((single * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-7)


def test_a_plan_with_spare_capacity_computes_the_same():
    """On a GPU the number of tokens is not known to the host: the plan then ends in filler texts."""
    torch.manual_seed(0)
    model = ALBEF(tiny_model()).double()
    batch = tiny_batch(4, 3, [3, 9, 1, 6])
    text_embeds = torch.randn(batch.text.num_tokens, 24, dtype=torch.float64)
    image_embeds = torch.randn(3, 5, 24, dtype=torch.float64)
    texts, images = torch.tensor([0, 2, 1, 3, 0, 2]), torch.tensor([2, 0, 0, 2, 1, 1])

    def logits(capacity):
        plan = FusionPlan.build(text_spans(batch.text), texts, images, 3, capacity)
        everything = torch.arange(plan.spans.num_rows)
        hidden = model.text_encoder.fuse(plan.gather(text_embeds), plan, image_embeds, everything)
        assert torch.isfinite(hidden).all()
        some = model.text_encoder.fuse(plan.gather(text_embeds), plan, image_embeds, plan.first.flip(0))
        torch.testing.assert_close(some.flip(0), hidden[plan.first])
        return some.flip(0)

    exact = logits(None)
    for capacity in (23, 24, 31, 32, 33, 54):
        torch.testing.assert_close(logits(capacity), exact, atol=1e-10, rtol=1e-8)
