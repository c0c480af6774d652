"""Evaluates a model on the test set that a recipe names, whatever its task."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from albef_ds.config import Config
from albef_ds.data.annotations import load_list
from albef_ds.data.augment import EvalTransform
from albef_ds.data.task_entries import (
    ENTAILMENT_LABELS,
    NLVR_LABELS,
    hypotheses,
    questions,
    read_entries,
    referring,
    statements,
)
from albef_ds.data.task_loader import image_roots
from albef_ds.data.task_samples import LabelledSamples, QuestionSamples, TaskSamples
from albef_ds.evaluation import classification, grounding, retrieval, vqa
from albef_ds.evaluation.ahead import NAMED, EvaluationError
from albef_ds.evaluation.examples import Example
from albef_ds.evaluation.sharding import Ranks
from albef_ds.evaluation.vqa_accuracy import VqaResultError, score_vqa, write_results

SHOWN = 8  # examples
VQA_WORDS = 50  # of a test question, as in the reference


@dataclass(frozen=True)
class Evaluated:
    """name: of the section in summary.json; score: the one number by which the best weights are chosen, in percent."""

    name: str
    metrics: dict
    score: float | None
    examples: list[Example] | list[retrieval.RetrievalExample] = field(default_factory=list)


def evaluate_recipe(
    model, config: Config, tokenizer, device: torch.device, file: str | None = None, out: Path | None = None
) -> Evaluated:
    """Evaluates on all ranks together; every rank gets the result.

    Args:
        file: annotations; None: data.test.
        out: where rank 0 writes what the model said (results.json); None: nowhere.

    Raises:
        EvaluationError: no test set is named, or it has entries or images that cannot be used.
    """
    file = file or config.data.test
    if not file:
        raise EvaluationError("data.test is empty: name the annotation file to evaluate on")
    evaluate = EVALUATE.get(config.task)
    if evaluate is None:
        raise EvaluationError(f"{config.task} has no evaluation of its own: evaluate what is fine-tuned from it")
    return evaluate(model, config, tokenizer, device, file, out)


def _retrieval(model, config: Config, tokenizer, device, file: str, out: Path | None) -> Evaluated:
    result = retrieval.evaluate_recipe(model, config, tokenizer, device, file)
    return Evaluated("retrieval", result.metrics, result.metrics["itm"]["mean"], result.examples)


def _vqa(model, config: Config, tokenizer, device, file: str, out: Path | None) -> Evaluated:
    samples = _samples(QuestionSamples, questions(answered=False), config, tokenizer, file, VQA_WORDS)
    listed = None if config.data.answer_list is None else [str(a) for a in load_list(Path(config.data.answer_list))]
    if listed is not None and not listed:
        raise EvaluationError(f"data.answer_list: {config.data.answer_list}: the list of answers is empty")
    truth = config.data.test_annotations if file == config.data.test else None
    if truth is not None and not Path(truth).is_file():
        raise EvaluationError(f"data.test_annotations: {truth}: no such file")
    if out is not None or truth is not None:
        _refuse_repeats([entry.question_id for entry in samples.entries], file)
    found = vqa.answer_all(
        model,
        samples,
        device,
        answers=listed,
        k=config.evaluation.k_test,
        first_token_twice=config.evaluation.first_token_twice,
        beams=config.evaluation.beams,
        size=config.evaluation.batch,
        workers=config.data.workers,
    )
    answers = vqa.results(samples, found)
    metrics, expected = {"questions": len(found)}, {}
    try:
        _on_rank_0(out, lambda path: write_results(path, answers))
        if truth is not None:
            score = score_vqa(answers, truth)
            metrics |= {
                "accuracy": score.overall,
                "per_answer_type": score.per_answer_type,
                "per_question_type": score.per_question_type,
            }
            annotations = json.loads(Path(truth).read_text(encoding="utf-8-sig"))["annotations"]
            expected = {a["question_id"]: a.get("multiple_choice_answer") for a in annotations}
    except VqaResultError as error:
        raise EvaluationError(f"{file}: {error}") from error
    return Evaluated("vqa", metrics, metrics.get("accuracy"), vqa.examples_of(samples, found, expected, SHOWN))


def _refuse_repeats(question_ids: list[int], file: str) -> None:
    """Before the work, and on all ranks: the server, and the accuracy, want one answer a question."""
    twice = [number for number, count in Counter(question_ids).items() if count > 1]
    if twice:
        shown = ", ".join(map(str, twice[:NAMED]))
        raise EvaluationError(f'{file}: "question_id" must tell the questions apart; missing (-1) or repeated: {shown}')


def _classification(parse: Callable, labels: tuple[str, ...]):
    def evaluate(model, config: Config, tokenizer, device, file: str, out: Path | None) -> Evaluated:
        samples = _samples(LabelledSamples, parse(labelled=False), config, tokenizer, file)
        found = classification.classify(model, samples, device, config.evaluation.batch, config.data.workers)
        said = [{"label": labels[f.label], "probabilities": f.probabilities} for f in found]
        _on_rank_0(out, lambda path: path.write_text(json.dumps(said), encoding="utf-8"))
        truth = [samples.entries[i].label for i in range(len(found))]
        metrics = classification.accuracy(found, truth, labels)
        shown = classification.examples_of(samples, found, labels, SHOWN)
        return Evaluated(config.task, metrics, metrics.get("accuracy"), shown)

    return evaluate


def _grounding(model, config: Config, tokenizer, device, file: str, out: Path | None) -> Evaluated:
    samples = _samples(TaskSamples, referring(), config, tokenizer, file)
    settings = config.evaluation
    found = grounding.ground_all(
        model,
        samples,
        device,
        by=settings.heatmap,
        layer=settings.heatmap_layer,
        size=settings.batch,
        workers=config.data.workers,
        relations=settings.relations,
    )
    metrics = grounding.score(samples, found)
    everything = metrics["all"]
    score = everything["pointing"] if everything["ranked"] is None else everything["ranked"]
    return Evaluated("grounding", metrics, score, grounding.examples_of(samples, found, SHOWN))


EVALUATE = {
    "pretraining": _retrieval,
    "retrieval": _retrieval,
    "vqa": _vqa,
    "entailment": _classification(hypotheses, ENTAILMENT_LABELS),
    "nlvr": _classification(statements, NLVR_LABELS),
    "grounding": _grounding,
}


def _samples(
    kind: type[TaskSamples], parse: Callable, config: Config, tokenizer, file: str, max_words: int = 30
) -> TaskSamples:
    """The entries of a test file, none left out, texts as long as the model can take them."""
    entries = read_entries(file, parse, image_roots(config))
    if entries.rejected:
        reasons = "; ".join(reason for _, reason in entries.rejected[:NAMED])
        raise EvaluationError(f"{len(entries.rejected)} entries of the test set cannot be used: {reasons}")
    transform = EvalTransform(config.model.vision.image_size)
    return kind(entries, tokenizer, transform, max_words, config.model.text.max_positions)


def _on_rank_0(out: Path | None, write: Callable[[Path], None]) -> None:
    if out is not None and Ranks.current().rank == 0:
        write(out / "results.json")
