"""The answer decoder of visual question answering: a causal BERT that reads a fused question (models/model_vqa.py).

Answers come packed, all answers to one question next to each other, so that the question's keys and values are
projected once and read in place, however many answers it has.
"""

from __future__ import annotations

from torch import Tensor

from albef_ds.config import TextConfig
from albef_ds.model.spans import Spans
from albef_ds.model.text import BertLayer, PackedBert, project_keys

Keys = list[tuple[Tensor, Tensor]]


class AnswerDecoder(PackedBert):
    """As many layers as the encoder has fusion layers, each with causal self-attention and cross-attention to the fused
    question. Token t of an answer predicts token t + 1."""

    def __init__(self, config: TextConfig, backend: str = "auto"):
        depth = config.layers - config.fusion_layer
        layers = [BertLayer(config, config.width, backend, causal=True) for _ in range(depth)]
        super().__init__(config, layers, prediction_head=True)

    def project_question(self, question_states: Tensor) -> Keys:
        """Fused questions [Tq, W] to every layer's keys and values [Tq, W]."""
        return project_keys(self.bert.encoder.layer, question_states)

    def decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        answers: Spans,
        keys: Keys,
        by_question: Spans,
        questions: Spans,
    ) -> Tensor:
        """Hidden states [T, W] of packed answers [T].

        Args:
            by_question: run i of the answers' rows belongs to question i.
            questions: run i of the keys is question i.
        """
        hidden = self.embed(input_ids, position_ids, answers)
        for layer, there in zip(self.bert.encoder.layer, keys, strict=True):
            hidden = self.run(layer, hidden, answers, there, by_question, questions)
        return hidden
