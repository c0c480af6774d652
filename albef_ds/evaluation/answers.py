"""Answers from a trained decoder: ranked among a fixed list (the reference's rank_answer, model_vqa.py), or written
freely by beam search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from albef_ds.data.batch import PackedText
from albef_ds.model.albef import text_spans
from albef_ds.model.answering import AnsweringParts, NextTokens, Question
from albef_ds.model.spans import Spans


@dataclass(frozen=True)
class RankedAnswers:
    """The k best of the list for each question, best first."""

    indices: Tensor  # [B, k] int64
    probabilities: Tensor  # [B, k], among these k


@torch.no_grad()
def rank_answers(
    model: AnsweringParts, question: Question, candidates: PackedText, k: int, first_token_twice: bool = True
) -> RankedAnswers:
    """Ranks the k candidates whose first token is likeliest by the probability of their whole text.

    Args:
        candidates: `[CLS] answer [SEP]`, at least three tokens each.
        k: at most the number of candidates is taken.
        first_token_twice: the reference adds the first token's log-probability to a sum that has it already; the
            published results are so. False counts it once.
    """
    k = min(k, candidates.num_texts)
    questions = question.spans.num
    first = candidates.cu_seqlens[:-1].long()
    start = PackedText.from_lists([[0]] * questions).to(first.device)
    start = PackedText(candidates.input_ids[:1].expand(questions), start.position_ids, start.cu_seqlens, start.lengths)
    states = model.answer_states(question, start, Spans.equal(questions, 1, first.device))
    likely = model.predict(states).softmax(-1).index_select(1, candidates.input_ids[first + 1])  # [B, candidates]
    likely, chosen = likely.topk(k, dim=1)

    answers = candidates.select(chosen.flatten())
    cu_questions = answers.cu_seqlens[::k].contiguous()
    longest = max(sum(answers.lengths[i : i + k]) for i in range(0, answers.num_texts, k))
    by_question = Spans(cu_questions, longest, answers.num_tokens)
    tokens = NextTokens.of(answers, by_question)
    words = model.predict_next(question, tokens).log_softmax(-1).gather(1, tokens.labels[:, None]).squeeze(1)
    scores = words.new_zeros(answers.num_texts).index_add_(0, text_spans(tokens.inputs).run_of_row, words)
    scores = scores.view(questions, k)
    if first_token_twice:
        scores = scores + likely.log()
    probabilities, place = scores.softmax(-1).topk(k, dim=1)
    return RankedAnswers(chosen.gather(1, place), probabilities)


@dataclass(frozen=True)
class WrittenAnswers:
    """The best `beams` answers to each question, best first."""

    ids: list[list[list[int]]]  # question, answer, tokens without [CLS] and [SEP]
    scores: Tensor  # [B, beams] log-probability, divided by length ** length_penalty


@torch.no_grad()
def write_answers(
    model: AnsweringParts,
    question: Question,
    first: int,
    end: int,
    beams: int = 3,
    max_tokens: int = 10,
    length_penalty: float = 0.0,
) -> WrittenAnswers:
    """Beam search for the likeliest texts.

    Args:
        first, end: the tokens that begin and end an answer ([CLS], [SEP]).
        max_tokens: of an answer, [SEP] included; what has not ended by then is cut.
        length_penalty: 0 ranks by probability; 1 by the mean log-probability of a token.
    """
    questions, device = question.spans.num, question.spans.cu_seqlens.device
    ids = torch.full((questions, beams, 1), first, device=device)
    # At the start all beams are one and the same: only the first may branch.
    scores = torch.full((questions, beams), float("-inf"), device=device)
    scores[:, 0] = 0.0
    ended = torch.zeros(questions, beams, dtype=torch.bool, device=device)
    for length in range(1, max_tokens + 1):
        states = model.answer_states(question, _packed(ids), Spans.equal(questions, beams * length, device))
        last = states.view(questions * beams, length, -1)[:, -1]
        following = model.predict(last).log_softmax(-1).view(questions, beams, -1)
        # An answer that has ended stays as it is: its only continuation is another [SEP], at no cost.
        following = following.masked_fill(ended[..., None], float("-inf"))
        following[..., end] = torch.where(ended, 0.0, following[..., end])
        total = (scores[..., None] + following).flatten(1)
        scores, best = total.topk(beams, dim=1)
        beam, token = best // following.shape[-1], best % following.shape[-1]
        ids = torch.cat([ids.gather(1, beam[..., None].expand(-1, -1, length)), token[..., None]], dim=-1)
        ended = ended.gather(1, beam) | (token == end)
        if bool(ended.all()):
            break
    lengths = (ids[..., 1:] != end).sum(-1) + 1  # [SEP], or the cut, counts as one
    scores = scores / lengths**length_penalty
    scores, place = scores.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, place[..., None].expand_as(ids))
    return WrittenAnswers([[_until(answer, end) for answer in row] for row in ids[..., 1:].tolist()], scores)


def _packed(ids: Tensor) -> PackedText:
    """[B, beams, L] ids as B * beams texts of L tokens."""
    rows, length = ids.shape[0] * ids.shape[1], ids.shape[2]
    spans = Spans.equal(rows, length, ids.device)
    places = torch.arange(length, device=ids.device).repeat(rows)
    return PackedText(ids.flatten(), places, spans.cu_seqlens, (length,) * rows)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
