"""The momentum teacher: an exponential moving average of parts of the student (paper section 3.3)."""

from __future__ import annotations

import copy

import torch
from torch import nn

from albef_ds.model.albef import Encoders


class Momentum(nn.Module):
    """Copies of the student's PARTS that no gradient reaches, in fp32 whatever the arithmetic: at momentum 0.995 a bf16
    average does not move at all.

    A teacher class inherits from this first and then from the class whose methods it shares with the student.

    Args:
        dropout: whether dropout stays on while training, as in the reference.
    """

    PARTS: tuple[str, ...]  # in the order of the reference's model_pairs

    def __init__(self, student: nn.Module, momentum: float, dropout: bool = True):
        nn.Module.__init__(self)  # not the shared class's: the parts are copies, there is nothing to build
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"model.momentum must lie between 0 and 1, got {momentum}")
        for part in self.PARTS:
            setattr(self, part, copy.deepcopy(getattr(student, part)).float().requires_grad_(False))
        self.momentum = momentum
        self.dropout = dropout
        self.train(student.training)

    def train(self, mode: bool = True):
        return super().train(mode and self.dropout)

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        for mine, theirs in zip(*self._pairs(student), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def move_towards(self, student: nn.Module) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, for all parameters in a few launches."""
        mine, theirs = self._pairs(student)
        theirs = [t if t.dtype == m.dtype else t.to(m.dtype) for t, m in zip(theirs, mine, strict=True)]
        torch._foreach_lerp_(mine, theirs, 1.0 - self.momentum)

    def _pairs(self, student: nn.Module) -> tuple[list, list]:
        return tuple([p for part in self.PARTS for p in getattr(model, part).parameters()] for model in (self, student))


class Teacher(Momentum, Encoders):
    """The teacher of pre-training and retrieval: both encoders and their projections."""
