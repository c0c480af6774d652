"""What every task has, so that the loop need know none of them: a student, its teacher, and the step's frame."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from albef_ds.config import ModelConfig


class Task(nn.Module):
    """A module from a batch to named losses. The loop calls start_step, forward once a micro-batch, and finish_step.

    Attributes:
        model: the student, whose parameters are trained.
        teacher: its moving average (albef_ds.model.teacher.Momentum), or None where nothing is distilled.
        alpha: weight of the teacher's soft targets in this step.
        measures: what a task wants logged beside its losses, 0-d tensors; the loop takes them and empties it.
    """

    def __init__(self, config: ModelConfig, model: nn.Module, teacher: nn.Module | None):
        super().__init__()
        self.config = config
        self.model = model
        self.teacher = teacher
        self.alpha = 0.0
        self.measuring = False  # whether this step's extra measures are wanted
        self.measures: dict[str, Tensor] = {}
        # Saved with the model: a step that was skipped must not move the teacher a second time after a resume.
        self.register_buffer("teacher_due", torch.ones((), dtype=torch.bool))
        self._teacher_due = True

    def start_step(self, alpha: float, measuring: bool = False) -> None:
        """Before the first micro-batch: the teacher moves once an optimiser step, before it is used."""
        self.alpha, self.measuring = alpha, measuring
        if self._teacher_due and self.teacher is not None:
            self.teacher.move_towards(self.model)
            self._set_teacher_due(False)

    def finish_step(self, applied: bool = True) -> None:
        """After the optimiser; `applied`: whether it changed the weights. A skipped step leaves all else alone too."""
        if applied:
            self._set_teacher_due(True)

    def after_load(self) -> None:
        """Call after a state dict was loaded."""
        self._teacher_due = bool(self.teacher_due)

    @property
    def temperature(self) -> nn.Parameter | None:
        """The contrastive temperature [1], where the task has one."""
        return getattr(self.model, "temp", None)

    def clamp_temperature(self) -> None:
        if self.temperature is not None:
            with torch.no_grad():
                self.temperature.clamp_(self.config.temperature_min, self.config.temperature_max)

    def _set_teacher_due(self, due: bool) -> None:
        self._teacher_due = due  # kept on the host too, so that nobody waits for the device to read it
        self.teacher_due.fill_(due)
