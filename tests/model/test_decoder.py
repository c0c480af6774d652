"""The answer decoder: causal, each answer on its own, each with its own question."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.model.albef import text_spans
from albef_ds.model.decoder import AnswerDecoder
from albef_ds.model.spans import Spans
from tests.tiny import VOCABULARY, tiny_batch, tiny_model

CONFIG = tiny_model().text


def build(dropout: float = 0.0) -> AnswerDecoder:
    torch.manual_seed(0)
    decoder = AnswerDecoder(tiny_model(dropout).text).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def decode(decoder: AnswerDecoder, answers, question_states: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
    """counts: answers of each question."""
    questions = torch.tensor([0] + [len(s) for s in question_states], dtype=torch.int32).cumsum(0).int()
    ends = torch.tensor([0, *counts]).cumsum(0)
    by_question = Spans(answers.cu_seqlens[ends].contiguous(), answers.num_tokens, answers.num_tokens)
    asked = Spans(questions, max(len(s) for s in question_states), int(questions[-1]))
    keys = decoder.project_question(torch.cat(question_states))
    return decoder.decode(answers.input_ids, answers.position_ids, text_spans(answers), keys, by_question, asked)


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(
    questions=st.lists(
        st.tuples(st.integers(1, 8), st.lists(st.integers(1, 6), min_size=1, max_size=3)), min_size=1, max_size=4
    )
)
def test_packed_answers_come_out_as_each_alone(questions):
    decoder = build().eval()
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(n, CONFIG.width, generator=generator, dtype=torch.float64) for n, _ in questions]
    lengths = [n for _, answers in questions for n in answers]
    answers = tiny_batch(1, 3, lengths).text
    together = decode(decoder, answers, states, [len(a) for _, a in questions]).split(lengths)
    owner = [i for i, (_, a) in enumerate(questions) for _ in a]
    for i, q in enumerate(owner):
        alone = decode(decoder, answers.select(torch.tensor([i])), [states[q]], [1])
        torch.testing.assert_close(together[i], alone, atol=1e-10, rtol=1e-10)


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 8), data=st.data())
def test_a_token_changes_nothing_before_it(length, data):
    decoder, place = build().eval(), data.draw(st.integers(1, length - 1))
    answers = tiny_batch(1, 3, [length]).text
    changed = answers.input_ids.clone()
    changed[place] = (changed[place] + 1) % VOCABULARY
    states = [torch.randn(4, CONFIG.width, dtype=torch.float64)]
    before = decode(decoder, answers, states, [1])
    after = decode(decoder, replace(answers, input_ids=changed), states, [1])
    assert torch.equal(before[:place], after[:place])
    assert (before[place:] != after[place:]).any(dim=1).all()


def test_it_has_as_many_layers_as_the_encoder_fuses_with_and_keys_of_its_own_width():
    layers = build().bert.encoder.layer
    assert len(layers) == CONFIG.layers - CONFIG.fusion_layer
    assert all(layer.crossattention.self.key.weight.shape == (CONFIG.width, CONFIG.width) for layer in layers)


def test_an_answer_too_long_for_the_position_embeddings_is_named():
    answers = tiny_batch(1, lengths=[17]).text
    with pytest.raises(ValueError, match="17 tokens does not fit model.text.max_positions = 16"):
        decode(build(), answers, [torch.randn(2, CONFIG.width, dtype=torch.float64)], [1])


def test_activation_checkpointing_gives_the_same_gradients():
    answers, gradients = tiny_batch(3, lengths=[4, 2, 5]).text, []
    states = [torch.randn(n, CONFIG.width, dtype=torch.float64) for n in (3, 6)]
    for checkpointing in (False, True):
        decoder = build(dropout=0.2).train()
        decoder.checkpointing = checkpointing
        torch.manual_seed(1)
        decoder.predict_tokens(decode(decoder, answers, states, [2, 1])).square().sum().backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")
