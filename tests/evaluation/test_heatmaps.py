"""Grad-CAM leaves the model as it was, and says where it cannot look. Its numbers: tests/test_reference_parity.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.evaluation.heatmaps import default_layer, itc_heatmaps, itm_heatmaps
from albef_ds.model.albef import ALBEF
from tests.tiny import tiny_batch, tiny_model


def build(**changes) -> ALBEF:
    torch.manual_seed(0)
    model = ALBEF(tiny_model(**changes), mlm_head=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_every_pair_has_its_own_map_whoever_else_is_in_the_batch(lengths):
    model, batch = build(), tiny_batch(len(lengths), 1, lengths)
    for look in (itm_heatmaps, itc_heatmaps):
        found = look(model, batch.images, batch.text)
        assert found.texts.shape == (len(lengths), 4, 4) and (found.texts >= 0).all()
        assert not found.texts.requires_grad and not found.scores.requires_grad
        for i in range(len(lengths)):
            alone = look(model, batch.images[i : i + 1], batch.text.select(torch.tensor([i])))
            largest = found.texts[i].max().item()
            torch.testing.assert_close(found.texts[i], alone.texts[0], atol=1e-4 * largest, rtol=0)
            torch.testing.assert_close(found.scores[i], alone.scores[0], atol=1e-4, rtol=1e-4)


def test_a_texts_map_is_the_mean_over_its_words():
    model, batch = build(), tiny_batch(3, lengths=[4, 1, 7])
    found = itm_heatmaps(model, batch.images, batch.text, layer=1)
    assert found.words.shape == (12, 4, 4)
    for text, words in zip(found.texts, found.words.split([4, 1, 7]), strict=True):
        torch.testing.assert_close(text, words.mean(0))


def test_scores_are_those_of_the_model():
    model, batch = build().eval(), tiny_batch(3)
    with torch.no_grad():
        image_embeds, image_feat = model.encode_image(batch.images)
        text_embeds, text_feat = model.encode_text(batch.text)
        own = torch.arange(3)
        logits = model.match(text_embeds, batch.text, own, image_embeds, own)[:, 1]
    torch.testing.assert_close(itm_heatmaps(model, batch.images, batch.text).scores, logits, atol=1e-5, rtol=1e-5)
    similarity = (image_feat * text_feat).sum(-1) / model.temp.item()
    torch.testing.assert_close(itc_heatmaps(model, batch.images, batch.text).scores, similarity, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model, batch = build(dropout=0.5).train(training), tiny_batch(2)
    model.vision_proj.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    forwards = [module.forward for module in model.modules()]
    with torch.no_grad():  # as evaluation runs it
        first, second = (look(model, batch.images, batch.text) for look in (itm_heatmaps, itm_heatmaps))
        itc_heatmaps(model, batch.images, batch.text)
    assert torch.equal(first.texts, second.texts)  # no dropout, whatever the mode
    assert model.training is training and [m.forward for m in model.modules()] == forwards
    for name, parameter in model.named_parameters():
        value, wanted = before[name]
        assert torch.equal(parameter, value) and parameter.requires_grad is wanted and parameter.grad is None


def test_an_error_in_between_leaves_it_as_it_was_too():
    model, batch = build().train(), tiny_batch(2)
    forwards = [module.forward for module in model.modules()]
    with pytest.raises(RuntimeError):
        itm_heatmaps(model, batch.images[:, :1], batch.text)
    assert [m.forward for m in model.modules()] == forwards and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("layer", [-1, 0, 3])
def test_a_layer_that_looks_at_no_image_is_named(layer):
    batch = tiny_batch(1)
    with pytest.raises(ValueError, match=f"layer {layer} has no cross-attention: choose one from 1 to 2"):
        itm_heatmaps(build(), batch.images, batch.text, layer)


@pytest.mark.parametrize("block", [-1, 2])
def test_a_block_that_is_not_there_is_named(block):
    batch = tiny_batch(1)
    with pytest.raises(ValueError, match=f"block {block}: the image encoder has blocks 0 to 1"):
        itc_heatmaps(build(), batch.images, batch.text, block)


@pytest.mark.parametrize(("layers", "fusion", "expected"), [(12, 6, 8), (6, 2, 4), (4, 2, 2), (3, 1, 1), (3, 2, 2)])
def test_the_default_is_the_third_fusion_layer_but_never_the_last_of_several(layers, fusion, expected):
    text = tiny_model().text.model_copy(update={"layers": layers, "fusion_layer": fusion})
    assert default_layer(build(text=text)) == expected
