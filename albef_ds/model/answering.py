"""ALBEF that answers questions about images: the fused question, read by a decoder (the reference's model_vqa.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PackedText
from albef_ds.model.albef import at_least_fp32, text_spans
from albef_ds.model.attention import Spans
from albef_ds.model.classifier import FusedText
from albef_ds.model.decoder import AnswerDecoder, Keys
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


def predicting(answers: PackedText) -> tuple[Tensor, Tensor]:
    """The rows of packed answers that predict a next token [P], and the rows of the tokens they predict [P]."""
    rows = torch.arange(answers.num_tokens, device=answers.input_ids.device)
    last = answers.cu_seqlens[1:].long() - 1
    keep = torch.ones_like(rows, dtype=torch.bool).index_fill_(0, last, False)
    # How many there are the host knows: every answer but its last token. A mask's own indexing would ask the device.
    where = torch.argsort(keep.int(), descending=True, stable=True)[: answers.num_tokens - answers.num_texts]
    return where, where + 1
