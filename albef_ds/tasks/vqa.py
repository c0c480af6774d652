"""Visual question answering by generation: a decoder learns to write the answers (paper section 4.3, model_vqa.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from albef_ds.config import ModelConfig
from albef_ds.data.batch import QuestionBatch
from albef_ds.model.albef import text_spans
from albef_ds.model.answering import Answering, AnsweringTeacher, NextTokens
from albef_ds.model.spans import Spans
from albef_ds.tasks.task import Task


class VQA(Task):
    """Every question with all its answers; an answer counts by its weight, the share of the annotators who gave it."""

    def __init__(self, config: ModelConfig):
        model = Answering(config)
        teacher = AnsweringTeacher(model, config.momentum, config.teacher_dropout) if config.distill else None
        super().__init__(config, model, teacher)

    def forward(self, batch: QuestionBatch) -> dict[str, Tensor]:
        """A micro-batch to {"answers"}: the weighted sum of the answers' losses, a question."""
        tokens = NextTokens.of(batch.answers, Spans(batch.cu_questions, batch.longest, batch.answers.num_tokens))

        def next_token(network) -> Tensor:
            return network.predict_next(network.read(batch.images, batch.text), tokens)

        log_probabilities = next_token(self.model).log_softmax(-1)  # [P, V]
        losses = -log_probabilities.gather(1, tokens.labels[:, None]).squeeze(1)
        if self.teacher is not None:
            with torch.no_grad():
                soft_labels = next_token(self.teacher).softmax(-1)
            losses = (1 - self.alpha) * losses - self.alpha * (soft_labels * log_probabilities).sum(-1)
        weights = batch.weights[text_spans(tokens.inputs).run_of_row]
        return {"answers": (weights * losses).sum() / len(batch)}
