"""The packed answers, read in place, cost what a padded decoder with copies of the question computes."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import PackedText, QuestionBatch
from albef_ds.model.albef import text_spans
from albef_ds.model.answering import NextTokens
from albef_ds.model.spans import Spans
from albef_ds.tasks.vqa import VQA
from tests.plain_bert import PlainEncoder, padded, plain_decoder
from tests.tiny import tiny_batch, tiny_model

ALPHA = 0.4
# (tokens of the question, tokens of each of its answers)
QUESTIONS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(2, 7), min_size=1, max_size=4)), min_size=1, max_size=4
)


def build(**changes) -> VQA:
    torch.manual_seed(0)
    task = VQA(tiny_model(**changes))
    with torch.no_grad():
        for parameter in task.parameters():  # the teacher apart from the student too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return task.double().eval()


def batch_of(questions, seed: int = 0) -> QuestionBatch:
    base = tiny_batch(len(questions), seed, [length for length, _ in questions])
    answers = tiny_batch(1, seed + 1, [n for _, lengths in questions for n in lengths]).text
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(answers.num_texts, generator=generator, dtype=torch.float64)
    counts = [len(lengths) for _, lengths in questions]
    return QuestionBatch.of(base.images.double(), base.text, answers, weights, counts)


def plain_loss(task: VQA, batch: QuestionBatch, counts: list[int]) -> torch.Tensor:
    """The reference's way: the question's states copied for each of its answers, everything padded."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids, mask = padded(batch.answers)

    def logits(network):
        images = network.visual_encoder.forward_features(batch.images)
        states, question_mask = PlainEncoder.like(network.text_encoder)(batch.text, images)
        decoder = plain_decoder(network.text_decoder)
        found = decoder(
            ids,
            attention_mask=mask,
            encoder_hidden_states=states[owner],
            encoder_attention_mask=question_mask[owner],
        )
        return found.logits[:, :-1]

    labels, real = ids[:, 1:], mask[:, 1:].bool()
    log_p = logits(task.model).log_softmax(-1)
    losses = -log_p.gather(-1, labels[..., None]).squeeze(-1)
    if task.teacher is not None:
        distilled = -(logits(task.teacher).softmax(-1) * log_p).sum(-1)
        losses = (1 - task.alpha) * losses + task.alpha * distilled
    return (batch.weights * (losses * real).sum(1)).sum() / len(counts)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(questions=QUESTIONS, seed=st.integers(0, 99), distill=st.booleans())
def test_the_packed_loss_is_the_padded_one(questions, seed, distill):
    task, batch = build(distill=distill), batch_of(questions, seed)
    task.alpha = ALPHA
    expected = plain_loss(task, batch, [len(lengths) for _, lengths in questions])
    torch.testing.assert_close(task(batch)["answers"], expected, atol=1e-7, rtol=1e-7)


@torch.no_grad()
def test_a_questions_answers_do_not_see_each_other_or_another_question():
    task = build()
    task.alpha = ALPHA
    together = batch_of([(5, [4, 3]), (2, [6])])
    first = QuestionBatch.of(
        together.images[:1],
        together.text.select(torch.tensor([0])),
        together.answers.select(torch.tensor([1, 0])),  # in another order
        together.weights[[1, 0]],
        [2],
    )
    second = QuestionBatch.of(
        together.images[1:],
        together.text.select(torch.tensor([1])),
        together.answers.select(torch.tensor([2])),
        together.weights[2:],
        [1],
    )
    apart = (task(first)["answers"] + task(second)["answers"]) / 2
    torch.testing.assert_close(task(together)["answers"], apart, atol=1e-9, rtol=1e-9)


def test_every_parameter_gets_a_gradient_and_the_teacher_none():
    task = build().train()
    task.start_step(ALPHA)
    task(batch_of([(5, [4, 3]), (2, [6])]))["answers"].backward()
    for name, parameter in task.model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(parameter.grad is None for parameter in task.teacher.parameters())


def test_without_distillation_there_is_no_teacher_and_alpha_does_nothing():
    task, batch = build(distill=False), batch_of([(3, [4])])
    assert task.teacher is None
    losses = []
    for alpha in (0.0, 1.0):
        task.start_step(alpha)
        losses.append(task(batch)["answers"].item())
        task.finish_step()
    assert losses[0] == losses[1]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(2, 6), min_size=1, max_size=4), min_size=1, max_size=5))
def test_every_token_but_the_last_predicts_the_next_of_its_own_answer(lengths):
    """lengths: of each question's answers."""
    words = iter(range(100, 10_000))
    lists = [[[next(words) for _ in range(n)] for n in own] for own in lengths]
    answers = PackedText.from_lists([ids for own in lists for ids in own])
    bounds = torch.tensor([0, *accumulate(sum(own) for own in lengths)], dtype=torch.int32)
    tokens = NextTokens.of(answers, Spans(bounds, max(map(sum, lengths)), answers.num_tokens))

    expected = PackedText.from_lists([ids[:-1] for own in lists for ids in own])
    assert tokens.inputs.lengths == expected.lengths
    for name in ("input_ids", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(tokens.inputs, name), getattr(expected, name)), name
    assert tokens.labels.tolist() == [word for own in lists for ids in own for word in ids[1:]]
    by_question = [sum(len(ids) - 1 for ids in own) for own in lists]
    assert tokens.by_question.lengths.tolist() == by_question
    assert tokens.by_question.max_length == max(by_question) and tokens.by_question.num_rows == sum(by_question)


def test_an_answer_of_one_token_is_refused():
    answers = PackedText.from_lists([[2, 5, 3], [2]])
    with pytest.raises(ValueError, match="text 1 has one token"):
        NextTokens.of(answers, text_spans(answers))


@pytest.mark.parametrize("counts", [[1], [2, 0, 1], [1, 1, 2], [1, 1]])
def test_counts_that_do_not_fit_are_refused(counts):
    base = tiny_batch(3)
    answers = PackedText.from_lists([[2, 5, 3]] * 3)
    with pytest.raises(ValueError, match="every question needs an answer"):
        QuestionBatch.of(base.images, base.text, answers, torch.ones(3), counts)
