"""Accuracy of visual entailment and NLVR2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from albef_ds.data.task_samples import LabelledSamples, TaskSample, stacked, texts_of
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.examples import Example, spread
from albef_ds.evaluation.samples import evaluating, over_ranks
from albef_ds.model.classifier import Classifier


@dataclass(frozen=True)
class Classified:
    label: int
    probabilities: tuple[float, ...]  # [C]


def classify(model: Classifier, samples: LabelledSamples, device, size: int, workers: int) -> list[Classified]:
    """The class of every entry, on all ranks."""

    def run(block: list[TaskSample]) -> list[Classified]:
        logits = model.classify(stacked(block).to(device), texts_of(block).to(device)).float()
        if not torch.isfinite(logits).all():
            raise EvaluationError("the model gives NaN or infinity for a class; the weights are probably broken")
        return [Classified(int(row.argmax()), tuple(row.softmax(-1).tolist())) for row in logits.cpu()]

    with evaluating(model, device):
        return over_ranks(samples, run, size, workers, "sentences")


def accuracy(found: Sequence[Classified], truth: Sequence[int], labels: Sequence[str]) -> dict:
    """Percent, of all and of each class, and the counts [true class][class found]; entries without a label are left
    out. Without any label there is nothing but their number."""
    counts = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    for result, label in zip(found, truth, strict=True):
        if label >= 0:
            counts[label, result.label] += 1
    total = int(counts.sum())
    if not total:
        return {"sentences": len(found)}
    right, each = counts.diagonal(), counts.sum(1)
    return {
        "accuracy": 100.0 * int(right.sum()) / total,
        "per_class": {name: 100.0 * int(r) / int(n) for name, r, n in zip(labels, right, each, strict=True) if n},
        "confusion": counts.tolist(),
        "sentences": len(found),
    }


def examples_of(
    samples: LabelledSamples, found: Sequence[Classified], labels: Sequence[str], wanted: int
) -> list[Example]:
    shown = []
    for i in spread(len(found), wanted):
        entry, result = samples.entries[i], found[i]
        known = entry.label >= 0
        share = result.probabilities[result.label]
        shown.append(
            Example(
                samples.paths(entry),
                entry.text,
                f"{labels[result.label]} ({share:.0%})",
                labels[entry.label] if known else None,
                entry.label == result.label if known else None,
            )
        )
    return shown
