"""Steps whose loss or gradient is not finite: all ranks skip them together, and stop after too many in a row.

Nobody waits for the device. DeepSpeed's ZeRO-2 forms the gradient norm of all ranks at every step, reads it on the
host anyway, and leaves weights, moments and masters alone where it is not finite; every rank reads the same number, so
every rank skips. It does so in fp32, under torch_autocast, and under bf16 with check_grad_overflow; configurations in
which it does not are refused. What it cannot see is a loss that is not finite with a gradient that is: a constant NaN
has none. So the loss's gradient is multiplied, on the device, by 1 or by NaN. No collective and no copy to the host is
added.

A skipped step leaves weights, optimiser state, teacher and queues alone. The step's number goes on all the same: it
says which samples come next and which learning rate, and a batch that breaks one step would break its repetition too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from albef_ds.config import ConfigError
from albef_ds.data.files import write_atomically
from albef_ds.training.json_lines import read_lines

DUMP = "bad_steps.json"


class BadStepsError(RuntimeError):
    """Too many steps in a row were skipped; the message names the file that says what they had in common."""


def check_precondition(engine: deepspeed.DeepSpeedEngine) -> None:
    """Raises ConfigError where DeepSpeed, as configured, would let a gradient that is not finite into the weights."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2):
        raise ConfigError(
            f"the DeepSpeed configuration has zero_optimization.stage {engine.zero_optimization_stage()}: steps that "
            "are not finite are skipped under stages 1 and 2 only"
        )
    if not optimizer.compute_grad_norm:
        raise ConfigError(
            "the DeepSpeed configuration sets zero_optimization.compute_grad_norm to false: without the norm nobody "
            "sees a gradient that is not finite; leave it out"
        )
    if optimizer.dtype == torch.bfloat16 and not optimizer.check_grad_overflow:
        raise ConfigError(
            "the DeepSpeed configuration sets bf16.check_grad_overflow to false: a gradient that is not finite would "
            "enter the weights; leave it out"
        )


class BadSteps:
    """Watches the steps of one run.

    Args:
        task: what is trained; its student's parts are told apart in the dump.
        limit: skipped steps in a row after which the run stops.
        output_dir: where the dump goes.
    """

    def __init__(self, task: nn.Module, limit: int, output_dir: str | Path):
        self.task, self.limit, self.output_dir = task, limit, Path(output_dir)
        self.skipped = 0  # since the run began or resumed
        self.in_a_row: list[dict] = []
        self._micro_batches: list[dict] = []

    @contextmanager
    def examined(self) -> Iterator[None]:
        """Around a micro-batch's forward and backward pass. After a skipped step, it measures the parts' gradients."""
        if not self.in_a_row:
            yield
            return
        norms = _PartNorms(self.task.model)
        try:
            yield
        finally:
            norms.remove()
        if self._micro_batches:
            self._micro_batches[-1]["grad_norms"] = norms.squares

    def total(self, losses: Mapping[str, Tensor], keys: tuple[str, ...] = ()) -> Tensor:
        """The sum that is minimised; where it is not finite, so is its gradient, whatever the losses' own gradients."""
        total = sum(losses.values())
        self._micro_batches.append({"keys": keys, "losses": {k: v.detach() for k, v in losses.items()}})
        sound = torch.isfinite(total.detach())
        return total * torch.where(sound, 1.0, math.nan).to(total.dtype)

    def after_step(self, step: int, applied: bool) -> bool:
        """Once an optimiser step. Returns whether there were too many skipped ones in a row: then call `stop`."""
        if applied:
            self.in_a_row = []
        else:
            self.skipped += 1
            self.in_a_row.append({"step": step, "micro_batches": [_on_host(m) for m in self._micro_batches]})
        self._micro_batches = []
        return len(self.in_a_row) >= self.limit

    def stop(self, last_checkpoint: Path | None) -> None:
        """Collective. Writes the dump and raises BadStepsError."""
        ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self.in_a_row)
        steps = [
            {"step": mine["step"], "ranks": [rank[i]["micro_batches"] for rank in ranks]}
            for i, mine in enumerate(self.in_a_row)
        ]
        path = self.output_dir / DUMP
        if dist.get_rank() == 0:
            checkpoint = None if last_checkpoint is None else str(last_checkpoint)
            write_atomically(path, json.dumps({"last_checkpoint": checkpoint, "steps": steps}, indent=1))
        dist.barrier()
        raise BadStepsError(
            f"{len(steps)} steps in a row ({steps[0]['step']} to {steps[-1]['step']}) had a loss or gradient that is "
            f"not finite (faults.max_bad_steps {self.limit}); {path} has their samples, losses and gradient norms of "
            f"every rank. The last good checkpoint is {last_checkpoint or 'none'}; lower optimizer.lr, set "
            "train.clip, or look at the samples"
        )


def count_skipped(metrics: Path) -> int:
    """Skipped steps of a whole run, by its metrics.jsonl: every line has the share of its window's steps."""
    return round(sum(line.get("skipped", 0.0) * line.get("window", 1) for line in read_lines(metrics)))


class _PartNorms:
    """Squared gradient norms of the student's parts (its direct children), formed while the backward pass runs."""

    def __init__(self, model: nn.Module):
        self.squares: dict[str, Tensor] = {}
        self._hooks = [
            parameter.register_hook(partial(self._add, name.partition(".")[0]))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    def _add(self, part: str, grad: Tensor) -> None:
        square = grad.detach().float().square().sum()
        self.squares[part] = self.squares[part] + square if part in self.squares else square

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _on_host(micro_batch: Mapping) -> dict:
    """As JSON can hold it: numbers that are not finite become their names."""
    found = {"keys": list(micro_batch["keys"]), "losses": {k: _number(v) for k, v in micro_batch["losses"].items()}}
    # Measured from the second skipped step in a row on.
    squares = micro_batch.get("grad_norms")
    found["grad_norms"] = None if squares is None else {k: _number(v.sqrt()) for k, v in squares.items()}
    return found


def _number(value: Tensor) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)
