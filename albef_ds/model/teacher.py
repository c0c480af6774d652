"""The momentum teacher: an exponential moving average of the student's encoders (paper section 3.3)."""

from __future__ import annotations

import copy

import torch

from albef_ds.model.albef import ALBEF, Encoders

PARTS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")  # the order of the reference's model_pairs


class Teacher(Encoders):
    """Copies of the student's encoders that no gradient reaches, in fp32 whatever the arithmetic: at momentum 0.995 a
    bf16 average does not move at all.

    Args:
        dropout: whether dropout stays on while training, as in the reference.
    """

    def __init__(self, student: ALBEF, momentum: float, dropout: bool = True):
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"model.momentum must lie between 0 and 1, got {momentum}")
        for part in PARTS:
            setattr(self, part, copy.deepcopy(getattr(student, part)).float().requires_grad_(False))
        self.momentum = momentum
        self.dropout = dropout
        self.train(student.training)

    def train(self, mode: bool = True):
        return super().train(mode and self.dropout)

    @torch.no_grad()
    def copy_from(self, student: ALBEF) -> None:
        for mine, theirs in zip(*self._pairs(student), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def move_towards(self, student: ALBEF) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, for all parameters in a few launches."""
        mine, theirs = self._pairs(student)
        theirs = [t if t.dtype == m.dtype else t.to(m.dtype) for t, m in zip(theirs, mine, strict=True)]
        torch._foreach_lerp_(mine, theirs, 1.0 - self.momentum)

    def _pairs(self, student: ALBEF) -> tuple[list, list]:
        return tuple([p for part in PARTS for p in getattr(model, part).parameters()] for model in (self, student))
