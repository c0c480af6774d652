"""Goes round the training loop until it is through: once, or again after every roll-back."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch.distributed as dist

from albef_ds.config import FaultsConfig
from albef_ds.data.worker_processes import lost_workers_named
from albef_ds.training.agreement import Agreement
from albef_ds.training.bad_steps import BadSteps, check_precondition, count_skipped
from albef_ds.training.checkpoint import Checkpoints
from albef_ds.training.loop import Faults, Plan, train
from albef_ds.training.monitor import Monitor
from albef_ds.training.rollback import roll_back
from albef_ds.training.spikes import PassedOver, RollBack, Spikes, passing_over
from albef_ds.training.stop import Stopped, StopSignals, forget_stopped, note_stopped
from albef_ds.training.watchdog import Watchdog


class Attempts:
    """The steps of one run.

    Args:
        batches: a step to this rank's micro-batches from there on, on its device.
        new_monitor: the step to begin with to a monitor.

    Raises ConfigError where DeepSpeed's configuration does not allow to skip bad steps.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        batches: Callable[[int], Generator],
        new_monitor: Callable[[int], Monitor],
        checkpoints: Checkpoints,
        output_dir: Path,
    ):
        check_precondition(engine)
        self.engine, self.batches, self.new_monitor, self.checkpoints = engine, batches, new_monitor, checkpoints
        self.output_dir = output_dir
        self.passed_over = PassedOver(output_dir)
        self.writes = dist.get_rank() == 0

    def run(self, plan: Plan, config: FaultsConfig, signals: StopSignals, watchdog: Watchdog) -> dict:
        """All steps of the plan; returns the run in numbers (rank 0; {} elsewhere).

        Raises, on all ranks: Stopped after a signal, BadStepsError, SpikeError.
        """
        if self.writes:
            forget_stopped(self.output_dir)
        agreement = Agreement()
        while True:
            bad_steps = BadSteps(self.engine.module, config.max_bad_steps, self.output_dir)
            spikes = Spikes(config) if config.rollback else None
            faults = Faults(bad_steps, agreement, signals, watchdog, spikes)
            passed_over = self.passed_over.positions
            monitor = self.new_monitor(plan.start_step)
            try:
                with (
                    lost_workers_named(),
                    signals.holding(config.dead_seconds),
                    closing(passing_over(self.batches, plan.start_step, plan.accumulation, passed_over)) as batches,
                ):
                    train(self.engine, batches, plan, monitor, self.checkpoints, faults)
                break
            except RollBack as spike:
                monitor.close()
                agreement.close()
                start = roll_back(self.engine, self.checkpoints, spike, self.passed_over, config.rollback_max)
                plan = replace(plan, start_step=start)
            except Stopped as stopped:
                monitor.close()
                if self.writes:
                    note_stopped(self.output_dir, stopped.step, signals.received)
                raise
        watchdog.outside()
        summary = monitor.close()
        return {**summary, "skipped_steps": count_skipped(self.output_dir / "metrics.jsonl")} if summary else {}
