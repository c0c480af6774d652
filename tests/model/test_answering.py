"""Question in, answer states out: what belongs to whom, and packed texts picked out of others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import PackedText
from albef_ds.model.answering import Answering, AnsweringTeacher
from albef_ds.model.spans import Spans
from tests.tiny import tiny_batch, tiny_model


def build(**changes) -> Answering:
    torch.manual_seed(0)
    return Answering(tiny_model(**changes)).eval()


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6),
    data=st.data(),
)
def test_selected_texts_are_those_texts_in_that_order(texts, data):
    index = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=8))
    found, expected = (
        PackedText.from_lists(texts).select(torch.tensor(index)),
        PackedText.from_lists([texts[i] for i in index]),
    )
    for name in ("input_ids", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.max_length == expected.max_length


@torch.no_grad()
def test_a_question_is_about_its_own_image():
    model, batch = build(), tiny_batch(3, lengths=[4, 2, 6])
    answers = PackedText.from_lists([[2, 7, 3]] * 3)
    by_question = Spans.equal(3, 3, "cpu")
    states = model.answer_states(model.read(batch.images, batch.text), answers, by_question).view(3, 3, -1)
    for i in range(3):
        question = model.read(batch.images[i : i + 1], batch.text.select(torch.tensor([i])))
        alone = model.answer_states(question, answers.select(torch.tensor([0])), Spans.equal(1, 3, "cpu"))
        torch.testing.assert_close(states[i], alone, atol=1e-5, rtol=1e-5)
    other = batch.images.clone()
    other[1] += 1.0
    changed = model.answer_states(model.read(other, batch.text), answers, by_question).view(3, 3, -1)
    assert torch.equal(changed[0], states[0]) and torch.equal(changed[2], states[2])
    assert not torch.allclose(changed[1], states[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_of_fp32_at_least(dtype):
    model = build().to(dtype)
    logits = model.predict(torch.randn(2, 24, dtype=dtype))
    assert logits.dtype == torch.promote_types(dtype, torch.float32) and logits.shape == (2, 61)


def test_the_teacher_answers_as_the_student_it_was_copied_from():
    student, batch = build(), tiny_batch(2, lengths=[3, 4])
    teacher = AnsweringTeacher(student, 0.995)
    answers = PackedText.from_lists([[2, 7, 3], [2, 8, 9, 3]])
    by_question = Spans(answers.cu_seqlens, 4, 7)
    with torch.no_grad():
        found = [m.answer_states(m.read(batch.images, batch.text), answers, by_question) for m in (student, teacher)]
    assert torch.equal(*found)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_activation_checkpointing_gives_the_same_gradients():
    batch, gradients = tiny_batch(2, lengths=[3, 4]), []
    answers = PackedText.from_lists([[2, 7, 3], [2, 8, 9, 3]])
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.enable_checkpointing()
        states = model.answer_states(model.read(batch.images, batch.text), answers, Spans(answers.cu_seqlens, 4, 7))
        model.predict(states).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")
