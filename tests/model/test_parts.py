"""Queue, teacher and encoders, each by what it promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.config import VisionConfig
from albef_ds.model.albef import ALBEF
from albef_ds.model.queue import FeatureQueue, gather_features
from albef_ds.model.teacher import Teacher
from albef_ds.model.text import TextEncoder
from albef_ds.model.vision import build_vision_encoder, fit_position_embeddings
from tests.ranks import run_ranks
from tests.tiny import tiny_batch, tiny_model


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 20), batches=st.lists(st.integers(1, 20), max_size=8))
def test_the_queue_holds_the_latest_features_in_a_ring(length, batches):
    queue = FeatureQueue(length, 2)
    expected, pointer, number = queue.image.clone(), 0, 0
    for size in (min(b, length) for b in batches):
        rows = torch.arange(number, number + size, dtype=torch.float32)[:, None].expand(-1, 2)
        queue.enqueue(rows, rows + 0.5)
        for row in rows:
            expected[pointer] = row
            pointer = (pointer + 1) % length
        number += size
        assert torch.equal(queue.image, expected)
        assert queue.pointer.item() == pointer
    if number >= length:
        assert torch.equal(queue.text, queue.image + 0.5)


def test_a_fresh_queue_is_random_unit_vectors():
    queue = FeatureQueue(100, 16)
    torch.testing.assert_close(queue.image.norm(dim=1), torch.ones(100))
    assert not torch.equal(queue.image, queue.text)


def test_a_batch_larger_than_the_queue_is_refused():
    with pytest.raises(ValueError, match="a batch of 5 features does not fit the queue of 4"):
        FeatureQueue(4, 2).enqueue(torch.zeros(5, 2), torch.zeros(5, 2))


def gather_on_a_rank():
    from albef_ds.training.engine import init_distributed

    rank, _, _ = init_distributed()
    rows = torch.arange(6.0).view(3, 2) + 100 * rank
    return gather_features(rows, -rows, torch.arange(3) + 10 * rank)


def test_features_and_ids_are_gathered_in_rank_order():
    for images, texts, ids in run_ranks(2, gather_on_a_rank):
        assert ids.tolist() == [0, 1, 2, 10, 11, 12]
        expected = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 100])
        assert torch.equal(images, expected)
        assert torch.equal(texts, -expected)


def test_the_teacher_starts_equal_takes_no_gradient_and_keeps_dropout_as_configured():
    student = ALBEF(tiny_model())
    teacher = Teacher(student, 0.9, dropout=True)
    assert all(torch.equal(p, student.get_parameter(n)) for n, p in teacher.named_parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.train().text_encoder.training
    assert not teacher.eval().text_encoder.training
    assert not Teacher(student, 0.9, dropout=False).train().text_encoder.training


@pytest.mark.parametrize("size", [32, 48, 80])
def test_any_image_size_and_resampled_position_embeddings(size):
    small = build_vision_encoder(VisionConfig(image_size=32, patch_size=8, width=24, layers=1, heads=2))
    other = build_vision_encoder(VisionConfig(image_size=size, patch_size=8, width=24, layers=1, heads=2))
    state = fit_position_embeddings(small.state_dict(), other)
    other.load_state_dict(state)
    assert other.forward_features(torch.randn(2, 3, size, size)).shape == (2, 1 + (size // 8) ** 2, 24)
    torch.testing.assert_close(other.pos_embed[:, 0], small.pos_embed[:, 0])  # [CLS] is no place in the image
    grid = small.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(size // 8, size // 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(other.pos_embed[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))


def test_our_attention_in_timms_vit_changes_nothing():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    config = VisionConfig(image_size=32, patch_size=8, width=24, layers=2, heads=2)
    ours = build_vision_encoder(config)
    stock = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    stock.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours.forward_features(images), stock.forward_features(images), atol=1e-5, rtol=1e-5)


def test_an_image_size_that_patches_do_not_tile_is_named():
    with pytest.raises(ValueError, match="image_size 30 is not a multiple of patch_size 8"):
        build_vision_encoder(VisionConfig(image_size=30, patch_size=8, width=24, layers=1, heads=2))


def test_a_text_longer_than_the_position_embeddings_is_named():
    model = ALBEF(tiny_model())
    with pytest.raises(ValueError, match="17 tokens does not fit model.text.max_positions = 16"):
        model.encode_text(tiny_batch(1, lengths=[17]).text)


def test_a_fusion_layer_outside_the_stack_is_named():
    config = tiny_model().text.model_copy(update={"fusion_layer": 3})
    with pytest.raises(ValueError, match="fusion_layer 3 must lie between 1 and layers - 1 = 2"):
        TextEncoder(config, 24)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ALBEF(tiny_model(dropout=0.2)).train()
        if checkpointing:
            model.enable_checkpointing()
        batch = tiny_batch(4)
        torch.manual_seed(1)
        image_embeds, image_feat = model.encode_image(batch.images)
        text_embeds, text_feat = model.encode_text(batch.text)
        index = torch.tensor([0, 1, 2, 3])
        match = model.match(text_embeds, batch.text, index, image_embeds, index.flip(0))
        (image_feat.sum() + text_feat.sum() + match.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")
