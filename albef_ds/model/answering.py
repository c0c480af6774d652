"""ALBEF that answers questions about images: the fused question, read by a decoder (the reference's model_vqa.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PackedText
from albef_ds.model.albef import at_least_fp32, text_spans
from albef_ds.model.classifier import FusedText
from albef_ds.model.decoder import AnswerDecoder, Keys
from albef_ds.model.spans import Spans
from albef_ds.model.teacher import Momentum
from albef_ds.model.text import TextEncoder
from albef_ds.model.vision import build_vision_encoder


@dataclass(frozen=True)
class Question:
    """Fused questions as the decoder wants them: every layer's keys and values, and whose they are."""

    keys: Keys  # of each layer, [Tq, W] twice
    spans: Spans  # run i is question i


class AnsweringParts(FusedText):
    """What student and teacher share."""

    PARTS = ("visual_encoder", "text_encoder", "text_decoder")
    text_decoder: AnswerDecoder

    def read(self, images: Tensor, questions: PackedText) -> Question:
        """Question i about image i."""
        states = self.fuse_all(images, questions)
        return Question(self.text_decoder.project_question(states), text_spans(questions))

    def answer_states(self, question: Question, answers: PackedText, by_question: Spans) -> Tensor:
        """Hidden states [T, W] of packed answers; run i of `by_question` is the rows of all answers to question i."""
        return self.text_decoder.decode(
            answers.input_ids, answers.position_ids, text_spans(answers), question.keys, by_question, question.spans
        )

    def predict_next(self, question: Question, tokens: NextTokens) -> Tensor:
        """Logits [P, V], fp32, of what follows each input."""
        return self.predict(self.answer_states(question, tokens.inputs, tokens.by_question))

    def predict(self, states: Tensor) -> Tensor:
        """Logits over the vocabulary [P, V], fp32, of decoder states [P, W]."""
        return at_least_fp32(self.text_decoder.predict_tokens(states))


class Answering(AnsweringParts):
    """The student."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_encoder(config.vision, config.attention)
        self.text_encoder = TextEncoder(config.text, config.vision.width, config.attention, mlm_head=False)
        self.text_decoder = AnswerDecoder(config.text, config.attention)

    def enable_checkpointing(self) -> None:
        self.visual_encoder.set_grad_checkpointing(True)
        self.text_encoder.checkpointing = self.text_decoder.checkpointing = True


class AnsweringTeacher(Momentum, AnsweringParts):
    """The momentum copy."""


@dataclass(frozen=True)
class NextTokens:
    """Answers as the decoder learns and ranks them: each token is predicted from those before it.

    An answer's last token, [SEP], predicts nothing, so the decoder does not read it: of `[CLS] red [SEP]` a third.
    """

    inputs: PackedText  # P tokens
    by_question: Spans  # run i: the inputs of all answers to question i
    labels: Tensor  # [P] int64, the token that follows each

    @classmethod
    def of(cls, answers: PackedText, by_question: Spans) -> NextTokens:
        """by_question: runs of the answers' tokens. Raises ValueError where an answer has one token alone."""
        inputs, rows = answers.without_last()
        before = torch.searchsorted(answers.cu_seqlens, by_question.cu_seqlens)  # answers that end before each bound
        cu_questions = (by_question.cu_seqlens - before).int()
        longest = by_question.max_length - 1  # at most; asking a GPU would wait for it
        if cu_questions.device.type == "cpu":
            longest = int(cu_questions.diff().max())
        return cls(inputs, Spans(cu_questions, longest, inputs.num_tokens), answers.input_ids[rows + 1])
