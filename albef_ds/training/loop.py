"""The training loop: the whole step on one screen. It knows no task; a task owns its losses and what it logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import deepspeed
import torch

from albef_ds.training.checkpoint import Checkpoints
from albef_ds.training.engine import clamp_temperature, set_learning_rate
from albef_ds.training.flops import FlopCount
from albef_ds.training.monitor import Monitor


@dataclass(frozen=True)
class Plan:
    """What to do at each step, as functions of the step's number alone, so that a resumed run does the same."""

    start_step: int
    total_steps: int
    accumulation: int
    learning_rate: Callable[[int], float]
    alpha: Callable[[int], float]
    checkpoint_every: int
    log_every: int
    log_keys: bool = False


def train(
    engine: deepspeed.DeepSpeedEngine, batches: Iterator, plan: Plan, monitor: Monitor, checkpoints: Checkpoints
) -> None:
    """Runs steps start_step to total_steps. `batches` yields this rank's micro-batches, on its device."""
    task = engine.module
    task.train()
    for step in range(plan.start_step, plan.total_steps):
        lr, alpha = plan.learning_rate(step), plan.alpha(step)
        set_learning_rate(engine, lr)
        task.start_step(alpha, measuring=(step + 1) % plan.log_every == 0)

        logged: dict[str, torch.Tensor] = {}
        for micro in range(plan.accumulation):
            waited = time.perf_counter()
            batch = next(batches)
            monitor.data_wait(time.perf_counter() - waited)
            monitor.rejected(batch.rejected)
            if plan.log_keys:
                monitor.keys(step + 1, batch.keys)
            first = step == plan.start_step and micro == 0
            with FlopCount() if first else nullcontext() as flops:
                losses = engine(batch)  # {"itc": ..., "itm": ..., "mlm": ...}
                engine.backward(sum(losses.values()))
            logged = {name: logged.get(name, 0) + loss.detach() / plan.accumulation for name, loss in losses.items()}
            if first:
                monitor.flops_per_step = flops.total * plan.accumulation
            engine.step()

        task.finish_step(applied=engine.was_step_applied())
        clamp_temperature(engine)
        monitor.log(step + 1, logged, {"lr": lr, "alpha": alpha, **measures(engine)})
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.total_steps:
            monitor.flush()
            with monitor.paused():
                checkpoints.save(engine, step + 1)


def measures(engine: deepspeed.DeepSpeedEngine) -> dict[str, float | torch.Tensor]:
    """What is worth a line beside the losses; tensors stay on the device until they are written."""
    norm = engine.get_global_grad_norm()
    task = engine.module
    values = dict(task.measures)
    if task.temperature is not None:
        values["temperature"] = task.temperature.detach()
    task.measures = {}
    return values if norm is None else {**values, "grad_norm": norm}
