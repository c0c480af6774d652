"""Learning rate and alpha as pure functions of the optimiser step.

Nothing here keeps state: a resumed run asks for the value at its step and gets what an uninterrupted run got.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]  # 0-based optimiser step -> learning rate of that step

REFERENCE_STRIDE = 100  # the reference touches its learning rate once per so many iterations of warm-up


@dataclass(frozen=True)
class ConstantSchedule:
    """The same learning rate always; for experiments."""

    lr: float

    def __call__(self, step: int) -> float:
        return self.lr


@dataclass(frozen=True)
class PaperSchedule:
    """Linear warm-up to `lr` over `warmup_steps` (the paper: 1,000 iterations), then a cosine to `min_lr`.

    Both move with every step; `min_lr` is reached at step `total_steps - 1`.
    Source: arXiv 2107.07651, section 3.5 (implementation details).
    """

    lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        decay_steps = max(self.total_steps - 1 - self.warmup_steps, 1)
        return self._decayed(min((step - self.warmup_steps) / decay_steps, 1.0))

    def _decayed(self, progress: float) -> float:
        return _cosine(self.lr, self.min_lr, progress)


@dataclass(frozen=True)
class LinearSchedule(PaperSchedule):
    """The same, but a straight line to `min_lr` (Defazio et al., 2023, arXiv:2310.07831)."""

    def _decayed(self, progress: float) -> float:
        return self.lr + (self.min_lr - self.lr) * progress


@dataclass(frozen=True)
class ReferenceSchedule:
    """What the reference's Pretrain.py and scheduler/cosine_lr.py do, quirks included.

    Warm-up is a staircase: the new value is set after the optimiser step of every 100th iteration, so it counts from
    the next one on, and only in epoch 0. Afterwards the rate is flat to the end of epoch 0, then one cosine value per
    epoch. An epoch 0 shorter than the warm-up leaves it unfinished, and the rate jumps at epoch 1.
    """

    lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int  # the reference's warmup_epochs * 100
    steps_per_epoch: int
    epochs: int

    def __call__(self, step: int) -> float:
        epoch, iteration = divmod(step, self.steps_per_epoch)
        if epoch > 0:
            # Past the planned epochs the reference's scheduler (cycle_limit 1) stays at its minimum.
            return _cosine(self.lr, self.min_lr, epoch / self.epochs) if epoch < self.epochs else self.min_lr
        stair = max(iteration - 1, 0) // REFERENCE_STRIDE  # the last stair set before this iteration
        stairs = self.warmup_steps // REFERENCE_STRIDE
        if stair >= stairs:
            return self.lr
        return self.warmup_lr + stair * (self.lr - self.warmup_lr) / stairs


SCHEDULES = ("reference", "paper", "linear", "constant")


def build_schedule(
    name: str,
    *,
    lr: float,
    min_lr: float,
    warmup_lr: float,
    warmup_steps: int,
    steps_per_epoch: int,
    total_steps: int,
    epochs: int | None = None,
) -> Schedule:
    """The learning rate of every optimiser step.

    Args:
        name: one of SCHEDULES.
        warmup_steps: in optimiser steps; the reference's configuration counts in hundreds (warmup_epochs 20 = 2000).
        steps_per_epoch: optimiser steps per pass over the data.
        epochs: length of the reference's cosine; None: as many epochs as `total_steps` reaches into.

    Raises:
        ValueError: unknown name, or a number that makes no sense, named.
    """
    _require(name in SCHEDULES, f"schedule: unknown name {name!r}; known: {', '.join(SCHEDULES)}")
    for key, value in {"lr": lr, "min_lr": min_lr, "warmup_lr": warmup_lr}.items():
        _require(math.isfinite(value) and value >= 0, f"{key} is {value}; expected a finite number >= 0")
    if name == "constant":
        return ConstantSchedule(lr)

    for key, value in {"min_lr": min_lr, "warmup_lr": warmup_lr}.items():
        _require(value <= lr, f"{key} is {value}, above lr ({lr}); lower it, or raise lr")
    for key, value in {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}.items():
        _require(value >= 1, f"{key} is {value}; expected at least 1")
    _require(warmup_steps >= 0, f"warmup_steps is {warmup_steps}; expected at least 0")

    if name in ("paper", "linear"):
        _require(
            warmup_steps < total_steps,
            f"warmup_steps ({warmup_steps}) must be below total_steps ({total_steps}), or lr is never reached",
        )
        kind = PaperSchedule if name == "paper" else LinearSchedule
        return kind(lr, min_lr, warmup_lr, warmup_steps, total_steps)

    epochs = math.ceil(total_steps / steps_per_epoch) if epochs is None else epochs
    _require(epochs >= 1, f"epochs is {epochs}; expected at least 1")
    _require(
        warmup_steps % REFERENCE_STRIDE == 0,
        f"warmup_steps is {warmup_steps}; the reference warms up in stairs of {REFERENCE_STRIDE} steps, so it must be "
        f"a multiple of {REFERENCE_STRIDE} (or use schedule 'paper')",
    )
    return ReferenceSchedule(lr, min_lr, warmup_lr, warmup_steps, steps_per_epoch, epochs)


def alpha_ramp(step: int, steps_per_epoch: int, alpha: float, ramp_epochs: float = 1.0) -> float:
    """Weight of the teacher's soft targets at an optimiser step: 0 at first, `alpha` after `ramp_epochs` epochs.

    One epoch is the reference's Pretrain.py; 0 means no ramp (its `warm_up: False`), 2 is LAVIS's and BLIP's choice.
    """
    _require(0.0 <= alpha <= 1.0, f"alpha is {alpha}; expected a number from 0 to 1")
    _require(steps_per_epoch >= 1, f"steps_per_epoch is {steps_per_epoch}; expected at least 1")
    _require(ramp_epochs >= 0, f"ramp_epochs is {ramp_epochs}; expected at least 0")
    ramp_steps = steps_per_epoch * ramp_epochs
    return alpha if step >= ramp_steps else alpha * (step / ramp_steps)


def _cosine(high: float, low: float, progress: float) -> float:
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * progress))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
