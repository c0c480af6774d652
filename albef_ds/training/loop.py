"""The training loop: the whole step on one screen. It knows no task; a task owns its losses and what it logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import deepspeed
import torch

from albef_ds.training.agreement import Agreement
from albef_ds.training.bad_steps import BadSteps
from albef_ds.training.checkpoint import Checkpoints
from albef_ds.training.engine import clamp_temperature, set_learning_rate
from albef_ds.training.flops import FlopCount
from albef_ds.training.host_memory import give_back
from albef_ds.training.monitor import Monitor
from albef_ds.training.spikes import DELAY, Spikes
from albef_ds.training.stop import Stopped, StopSignals, signals_blocked
from albef_ds.training.watchdog import Watchdog


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
    validate: Callable[[int], None] | None = None
    validate_every: int | None = None


@dataclass(frozen=True)
class Faults:
    """What watches the run while the loop goes round; each is a file of its own."""

    bad_steps: BadSteps
    agreement: Agreement
    signals: StopSignals
    watchdog: Watchdog
    spikes: Spikes | None = None


def train(
    engine: deepspeed.DeepSpeedEngine,
    batches: Iterator,
    plan: Plan,
    monitor: Monitor,
    checkpoints: Checkpoints,
    faults: Faults,
) -> None:
    """Runs steps start_step to total_steps. `batches` yields this rank's micro-batches, on its device.

    Raises, on all ranks at the same step: Stopped (asked to end, and saved), BadStepsError, CheckpointError, RollBack.
    """
    task = engine.module
    task.train()
    for step in range(plan.start_step, plan.total_steps):
        lr, alpha = plan.learning_rate(step), plan.alpha(step)
        set_learning_rate(engine, lr)
        task.start_step(alpha, measuring=(step + 1) % plan.log_every == 0)

        logged: dict[str, torch.Tensor] = {}
        for micro in range(plan.accumulation):
            first = step == plan.start_step and micro == 0
            faults.watchdog.at(step + 1, "waiting for its batch")
            waited = time.perf_counter()
            with signals_blocked() if first else nullcontext():  # the loader's processes start with the first batch
                batch = next(batches)
            monitor.data_wait(time.perf_counter() - waited)
            monitor.rejected(batch.rejected)
            if plan.log_keys:
                monitor.keys(step + 1, batch.keys)
            faults.watchdog.at(step + 1, "computing")
            with FlopCount() if first else nullcontext() as flops, faults.bad_steps.examined():
                losses = engine(batch)  # {"itc": ..., "itm": ..., "mlm": ...}
                engine.backward(faults.bad_steps.total(losses, batch.keys))
            logged = {name: logged.get(name, 0) + loss.detach() / plan.accumulation for name, loss in losses.items()}
            if first:
                monitor.flops_per_step = flops.total * plan.accumulation
            engine.step()

        applied = engine.was_step_applied()  # not where a loss or gradient of any rank is not finite
        task.finish_step(applied)
        clamp_temperature(engine)
        monitor.log(step + 1, logged, {"lr": lr, "alpha": alpha, "skipped": 1.0 - applied, **measures(engine)})
        if (step + 1) % plan.log_every == 0:
            give_back()
        if faults.bad_steps.after_step(step + 1, applied):
            checkpoints.finish()
            faults.bad_steps.stop(checkpoints.newest())
        stop = asked_to_stop(faults, checkpoints, step, logged)
        last = step + 1 == plan.total_steps
        if (step + 1) % plan.checkpoint_every == 0 or last or stop:
            faults.watchdog.at(step + 1, "saving")
            monitor.flush()
            with monitor.paused():
                checkpoints.save(engine, step + 1)
        if plan.validate_every and (step + 1) % plan.validate_every == 0 and not stop:
            faults.watchdog.outside()  # nothing tells how long it takes
            with monitor.paused():
                plan.validate(step + 1)
        if stop and not last:
            checkpoints.finish()
            raise Stopped(step + 1)
    checkpoints.finish()
    faults.agreement.close()


def asked_to_stop(faults: Faults, checkpoints: Checkpoints, step: int, losses: dict[str, torch.Tensor]) -> bool:
    """Whether any rank was asked to end by the last step; on all ranks the same. Raises RollBack after a loss spike,
    CheckpointError where a checkpoint could not be written and the run is to stop then."""
    loss = sum(losses.values()) if faults.spikes is not None else None
    agreed = faults.agreement.exchange(faults.signals.received is not None, checkpoints.failed, loss)
    if agreed.saving_failed:
        checkpoints.give_up()
    if agreed.loss is not None:
        faults.spikes.add(step - DELAY, agreed.loss)
    return agreed.stop


def measures(engine: deepspeed.DeepSpeedEngine) -> dict[str, float | torch.Tensor]:
    """What is worth a line beside the losses; tensors stay on the device until they are written."""
    norm = engine.get_global_grad_norm()
    task = engine.module
    values = dict(task.measures)
    if task.temperature is not None:
        values["temperature"] = task.temperature.detach()
    task.measures = {}
    return values if norm is None else {**values, "grad_norm": norm}
