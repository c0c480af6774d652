"""Ranking against a plain loop over question and answer; beam search against trying all texts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import PackedText
from albef_ds.evaluation.answers import rank_answers, write_answers
from albef_ds.model.answering import Answering
from tests.plain_bert import PlainEncoder, padded, plain_decoder
from tests.tiny import tiny_batch, tiny_model

CLS, SEP = 2, 3
VOCABULARY = 6  # small enough to try every text


def build(vocabulary: int = 61, seed: int = 0, spread: float = 0.3) -> Answering:
    torch.manual_seed(seed)
    text = tiny_model().text.model_copy(update={"vocab_size": vocabulary})
    model = Answering(tiny_model(text=text))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.double().eval()


def ask(model: Answering, size: int, seed: int = 0, vocabulary: int = 61):
    batch = tiny_batch(size, seed, [1 + (3 * i + seed) % 7 for i in range(size)])
    return batch.images.double(), replace(batch.text, input_ids=batch.text.input_ids % vocabulary)


def plain_log_probabilities(model: Answering, images, questions, answers: PackedText) -> torch.Tensor:
    """[B, A, L - 1]: the log-probability of each next token of each answer, 0 behind its end."""
    states, mask = PlainEncoder.like(model.text_encoder)(questions, model.visual_encoder.forward_features(images))
    decoder, (ids, real) = plain_decoder(model.text_decoder), padded(answers)
    found = []
    for state, there in zip(states, mask, strict=True):
        looked_at = state.expand(len(ids), -1, -1), there.expand(len(ids), -1)
        logits = decoder(
            ids, attention_mask=real, encoder_hidden_states=looked_at[0], encoder_attention_mask=looked_at[1]
        ).logits
        next_token = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        found.append(next_token * real[:, 1:])
    return torch.stack(found)


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(
    questions=st.integers(1, 4),
    lengths=st.lists(st.integers(3, 7), min_size=1, max_size=7),
    k=st.integers(1, 8),
    twice=st.booleans(),
    seed=st.integers(0, 50),
)
def test_ranking_is_that_of_a_plain_loop(questions, lengths, k, twice, seed):
    model = build()
    images, asked = ask(model, questions, seed)
    candidates = tiny_batch(1, seed, lengths).text
    steps = plain_log_probabilities(model, images, asked, candidates)
    first = steps[:, :, 0]
    ranked = rank_answers(model, model.read(images, asked), candidates, k, twice)
    k = min(k, len(lengths))
    assert ranked.indices.shape == ranked.probabilities.shape == (questions, k)
    for q in range(questions):
        shares, order = first[q].sort(descending=True)
        assume(k == len(lengths) or shares[k - 1] - shares[k] > 1e-9)  # equal first tokens: either may be ranked
        likely = order[:k]
        scores = steps[q, likely].sum(1) + (first[q, likely] if twice else 0)
        expected, place = scores.softmax(-1).sort(descending=True)
        torch.testing.assert_close(ranked.probabilities[q], expected, atol=1e-9, rtol=1e-7)
        # Candidates may be equal texts with equal scores: what is chosen must score so, whatever its number.
        found = steps[q, ranked.indices[q]].sum(1) + (first[q, ranked.indices[q]] if twice else 0)
        torch.testing.assert_close(found, scores[place], atol=1e-9, rtol=1e-7)
        assert len(set(ranked.indices[q].tolist())) == k


@torch.no_grad()
def test_the_first_token_twice_changes_the_ranking():
    """Else no test would tell the reference's way from the plain one."""
    model = build()
    images, asked = ask(model, 4)
    candidates, question = tiny_batch(1, 0, [5, 3, 6, 4, 3]).text, model.read(images, asked)
    once, twice = (rank_answers(model, question, candidates, 5, way).probabilities for way in (False, True))
    assert not torch.allclose(once, twice)


def every_text(longest: int) -> list[list[int]]:
    """All texts that end with [SEP] within `longest` tokens, and all that are cut there."""
    words = [token for token in range(VOCABULARY) if token != SEP]
    ended = [[*text, SEP] for n in range(longest) for text in itertools.product(words, repeat=n)]
    return ended + [list(text) for text in itertools.product(words, repeat=longest)]


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize(("questions", "seed"), [(1, 0), (3, 1), (2, 2)])
def test_beam_search_with_beams_enough_finds_the_best_of_all_texts(questions, seed, penalty):
    longest = 3
    model = build(VOCABULARY, seed)
    images, asked = ask(model, questions, seed, VOCABULARY)
    texts = every_text(longest)
    scores = plain_log_probabilities(model, images, asked, PackedText.from_lists([[CLS, *t] for t in texts])).sum(-1)
    lengths = torch.tensor([len(text) if text[-1] == SEP else len(text) + 1 for text in texts])
    scores = scores / lengths**penalty
    written = write_answers(model, model.read(images, asked), CLS, SEP, VOCABULARY**longest, longest, penalty)
    for q in range(questions):
        best = scores[q].argsort(descending=True)[:20].tolist()
        expected = [texts[i][:-1] if texts[i][-1] == SEP else texts[i] for i in best]
        assert written.ids[q][:20] == expected
        torch.testing.assert_close(written.scores[q, :20], scores[q, best], atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_few_beams_give_texts_with_their_own_probabilities(beams):
    model = build(VOCABULARY, seed=3)
    images, asked = ask(model, 3, 3, VOCABULARY)
    question = model.read(images, asked)
    written = write_answers(model, question, CLS, SEP, beams, max_tokens=5)
    assert written.scores.shape == (3, beams)
    for q, answers in enumerate(written.ids):
        assert len(answers) == beams and len({tuple(a) for a in answers}) == beams
        assert all(SEP not in answer and len(answer) <= 5 for answer in answers)
        assert written.scores[q].tolist() == sorted(written.scores[q].tolist(), reverse=True)
        whole = PackedText.from_lists([[CLS, *a, *([SEP] if len(a) < 5 else [])] for a in answers])
        expected = plain_log_probabilities(model, images[q : q + 1], asked.select(torch.tensor([q])), whole).sum(-1)[0]
        torch.testing.assert_close(written.scores[q], expected, atol=1e-9, rtol=1e-9)
    # A question's answers do not depend on who else is asked.
    alone = write_answers(model, model.read(images[1:2], asked.select(torch.tensor([1]))), CLS, SEP, beams, 5)
    assert alone.ids == written.ids[1:2]


@torch.no_grad()
def test_one_beam_takes_the_likeliest_token_each_time():
    model = build(VOCABULARY, seed=4)
    images, asked = ask(model, 2, 4, VOCABULARY)
    written = write_answers(model, model.read(images, asked), CLS, SEP, beams=1, max_tokens=6)
    for q in range(2):
        text = [CLS]
        for _ in range(6):
            options = PackedText.from_lists([[*text, token] for token in range(VOCABULARY)])
            one = images[q : q + 1], asked.select(torch.tensor([q]))
            text.append(int(plain_log_probabilities(model, *one, options)[0, :, -1].argmax()))
            if text[-1] == SEP:
                break
        assert written.ids[q] == [[token for token in text[1:] if token != SEP]]


@torch.no_grad()
def test_an_answer_that_ended_at_once_is_empty_and_searching_stops():
    model = build(VOCABULARY)
    model.text_decoder.cls.predictions.bias[SEP] += 100.0
    images, asked = ask(model, 2, 0, VOCABULARY)
    calls, whole = [], model.answer_states
    model.answer_states = lambda *inputs: (calls.append(1), whole(*inputs))[1]
    written = write_answers(model, model.read(images, asked), CLS, SEP, beams=1, max_tokens=9)
    assert written.ids == [[[]], [[]]] and len(calls) == 1
    torch.testing.assert_close(written.scores, torch.zeros_like(written.scores), atol=1e-6, rtol=0)
