"""The encoder of two images: what a pair of layers shares, in student and teacher, and what it does not."""

from __future__ import annotations

import pytest
import torch

from albef_ds.model.albef import text_spans
from albef_ds.model.packing import FusionPlan
from albef_ds.model.pairs import PairTextEncoder
from albef_ds.tasks.nlvr import NLVR
from tests.tiny import tiny_batch, tiny_model


def build() -> PairTextEncoder:
    torch.manual_seed(0)
    return PairTextEncoder(tiny_model().text, 24).eval()


def pairs_of_layers(encoder: PairTextEncoder) -> list[tuple]:
    layers = list(encoder.fusion_layers)
    return list(zip(layers[::2], layers[1::2], strict=True))


def shared(left, right) -> set[str]:
    theirs = {id(parameter) for parameter in right.parameters()}
    return {name for name, parameter in left.named_parameters() if id(parameter) in theirs}


def test_every_fusion_layer_is_there_twice_and_a_pair_shares_keys_and_values_alone():
    config = tiny_model().text
    task = NLVR(tiny_model())
    names = {f"crossattention.self.{kind}.{part}" for kind in ("key", "value") for part in ("weight", "bias")}
    for encoder in (task.model.text_encoder, task.teacher.text_encoder):  # the teacher's copies are tied as well
        assert len(encoder.fusion_layers) == 2 * (config.layers - config.fusion_layer)
        assert all(shared(left, right) == names for left, right in pairs_of_layers(encoder))
    mine = {id(p) for p in task.model.parameters()}
    assert not mine & {id(p) for p in task.teacher.parameters()}


def test_the_teacher_moves_a_shared_tensor_once():
    task = NLVR(tiny_model(momentum=0.5))
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1.0)
    before = {name: p.clone() for name, p in task.teacher.named_parameters()}
    task.start_step(0.0)
    for name, parameter in task.teacher.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1], [4, 1, 9]])
def test_layers_look_left_and_right_in_turn(lengths):
    encoder, batch = build(), tiny_batch(len(lengths), lengths=lengths)
    spans = text_spans(batch.text)
    left, right = torch.randn(2, len(lengths), 5, 24)
    hidden = encoder.encode(batch.text.input_ids, batch.text.position_ids, spans)
    plan = FusionPlan.aligned(spans)
    found = encoder.fuse(hidden, plan, torch.cat([left, right]), None)
    for i, layer in enumerate(encoder.fusion_layers):
        image = (left, right)[i % 2].flatten(0, 1)
        projections = layer.crossattention.self
        keys = (projections.key(image), projections.value(image))
        image_spans = encoder.project_image(left)[1]
        hidden = layer(hidden, spans, keys, plan.groups, image_spans)
    torch.testing.assert_close(found, hidden)


def test_both_images_and_the_shared_projections_get_gradients():
    encoder, batch = build(), tiny_batch(2, lengths=[3, 5])
    spans = text_spans(batch.text)
    images = torch.randn(4, 5, 24, requires_grad=True)
    hidden = encoder.encode(batch.text.input_ids, batch.text.position_ids, spans)
    plan = FusionPlan.aligned(spans)
    encoder.fuse(hidden, plan, images, plan.first).square().sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
