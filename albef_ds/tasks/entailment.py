"""Visual entailment (SNLI-VE): does the image entail the sentence, contradict it, or neither (models/model_ve.py)."""

from __future__ import annotations

from albef_ds.tasks.classification import Classification

LABELS = ("contradiction", "neutral", "entailment")  # their places are the class numbers of the reference


class Entailment(Classification):
    classes = len(LABELS)
