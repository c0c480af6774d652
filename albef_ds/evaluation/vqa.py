"""Answers to a whole test set of questions: ranked among a list or written freely, scored as VQA does, and the file
that its evaluation server takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from albef_ds.data.batch import PackedText
from albef_ds.data.task_samples import QuestionSamples, TaskSample, answer_ids, stacked, texts_of
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.answers import rank_answers, write_answers
from albef_ds.evaluation.examples import Example, spread
from albef_ds.evaluation.samples import evaluating, over_ranks
from albef_ds.model.answering import Answering


@dataclass(frozen=True)
class Answered:
    answer: str
    probability: float  # among the k ranked ones; of the whole text where it was written freely


def answer_all(
    model: Answering,
    samples: QuestionSamples,
    device,
    *,
    answers: Sequence[str] | None,
    k: int,
    first_token_twice: bool,
    beams: int,
    size: int,
    workers: int,
) -> list[Answered]:
    """The best answer to every question, on all ranks.

    Args:
        answers: the list to choose from; None: written freely by beam search with `beams` beams.
        k: as rank_answers.
    """
    tokenizer = samples.tokenizer
    candidates = None
    if answers is not None:
        candidates = PackedText.from_lists(answer_ids(tokenizer, answers, samples.max_tokens)).to(device)

    def run(block: list[TaskSample]) -> list[Answered]:
        question = model.read(stacked(block).to(device), texts_of(block).to(device))
        if candidates is not None:
            ranked = rank_answers(model, question, candidates, k, first_token_twice)
            best, shares = ranked.indices[:, 0].tolist(), ranked.probabilities[:, 0].tolist()
            _refuse_nan(ranked.probabilities)
            return [Answered(answers[i], share) for i, share in zip(best, shares, strict=True)]
        written = write_answers(model, question, tokenizer.cls_id, tokenizer.sep_id, beams)
        _refuse_nan(written.scores[:, 0])
        shares = written.scores[:, 0].exp().tolist()
        return [Answered(tokenizer.decode(a[0]), share) for a, share in zip(written.ids, shares, strict=True)]

    with evaluating(model, device):
        return over_ranks(samples, run, size, workers, "questions")


def _refuse_nan(scores: Tensor) -> None:
    if not torch.isfinite(scores).all():
        raise EvaluationError("the model gives NaN or infinity for an answer; the weights are probably broken")


def results(samples: QuestionSamples, found: Sequence[Answered]) -> list[dict]:
    """What the evaluation server takes."""
    ids = [samples.entries[i].question_id for i in range(len(found))]
    return [{"question_id": i, "answer": answered.answer} for i, answered in zip(ids, found, strict=True)]


def examples_of(
    samples: QuestionSamples, found: Sequence[Answered], expected: dict[int, str | None], wanted: int
) -> list[Example]:
    """expected: what most annotators said, by question id."""
    shown = []
    for i in spread(len(found), wanted):
        entry, answered = samples.entries[i], found[i]
        truth = expected.get(entry.question_id)
        right = None if truth is None else truth == answered.answer
        said = f"{answered.answer} ({answered.probability:.0%})"
        shown.append(Example(samples.paths(entry), entry.text, said, truth, right))
    return shown
