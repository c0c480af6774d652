"""Optimiser steps of pre-training, each as another made-up rank: what it asks the other ranks for.

    python -m benchmarks.fake_steps cuda|cpu < ORDERS > ANSWERS

ORDERS are lines of JSON, an `Order` each; so are ANSWERS, of `step`. benchmarks.collectives writes and reads them. To
import PyTorch and DeepSpeed takes as long as several steps, so a process leaves a group and joins the next one.

Real are the project's engine and task, and DeepSpeed's ZeRO with its buckets and hooks. Made up are the other ranks
(benchmarks.fake_ranks) and the tensors, which have a device, a dtype and a shape, and no values. "cuda" is a GPU that
is not there (benchmarks.fake_gpu); "cpu" is DeepSpeed's way on a machine without one, whether there is one or not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from albef_ds.config import ModelConfig
    from albef_ds.data.batch import PretrainingBatch
    from albef_ds.tasks.pretraining import Pretraining

PHASES = ("forward", "backward", "optimizer", "queues")
GPU = 0  # of a rank's host: each rank's is the first one


@dataclass(frozen=True)
class Order:
    """Whose step, and of what."""

    deepspeed: dict  # DeepSpeed's JSON
    world: int
    rank: int
    preset: str  # of benchmarks.workload
    batch: int  # samples a rank; whole eights


@dataclass(frozen=True)
class Machine:
    """Where tensors without values lie."""

    mode: FakeTensorMode
    device: str
    move: Callable[[PretrainingBatch], PretrainingBatch]


def main(argv: list[str] | None = None) -> int:
    """The command line in this file's head."""
    (accelerator,) = sys.argv[1:] if argv is None else argv
    machine = MACHINES[accelerator]()
    from deepspeed import DeepSpeedEngine

    gc.disable()  # a tenth of the time, and there is little to be freed
    DeepSpeedEngine._broadcast_model = lambda self: None  # hundreds of collectives, and none of a step's
    with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed may say what it likes
        for line in sys.stdin:
            print(json.dumps(step(Order(**json.loads(line)), machine)), file=sys.__stdout__, flush=True)
    return 0


def with_gpu() -> Machine:
    os.environ["DS_ACCELERATOR"] = "cuda"  # read when DeepSpeed is imported
    os.environ.pop("TRITON_INTERPRET", None)  # of a test run on a machine that does not claim to have a GPU
    from benchmarks import fake_gpu

    mode = fake_gpu.install((8, 0), flash=False)  # before torch is imported; which kernel attends sends nothing
    from benchmarks import fake_ranks

    fake_ranks.take_gpu(GPU)
    return Machine(mode, f"cuda:{GPU}", fake_gpu.move)


def without_gpu() -> Machine:
    # Read when DeepSpeed is imported, and when PyTorch first looks for a GPU.
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks import fake_ranks

    fake_ranks.keep_parameters()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return Machine(mode, "cpu", lambda batch: batch._map(mode.from_tensor))


MACHINES = {"cuda": with_gpu, "cpu": without_gpu}


def step(order: Order, machine: Machine) -> dict:
    """
    Returns:
        "accelerator" as DeepSpeed names it, "trained" parameters, and the fields of fake_ranks.Collective in order, by
        PHASES of the first step.

    Raises:
        RuntimeError: DeepSpeed has skipped the step, so what is counted is not one.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    from albef_ds.config import BatchPlan, OptimizerConfig
    from albef_ds.training.engine import build_engine, clamp_temperature, engine_config
    from benchmarks import fake_ranks

    logger.setLevel("ERROR")
    fake_ranks.join(order.rank, order.world, GPU)
    blank, batch = blank_task(order), batch_of(order.preset, order.batch, machine)
    sizes = {"global_batch": order.batch * order.world, "micro_batch": order.batch}
    plan = BatchPlan(**sizes, accumulation=1, world_size=order.world)
    asked: dict[str, list[tuple]] = {}
    with machine.mode, fake_ranks.Listen(machine.mode) as heard:

        def end_of(phase: str) -> None:
            asked[phase] = [dataclasses.astuple(collective) for collective in heard.collectives]
            heard.collectives.clear()

        task = put(blank, machine)
        engine = build_engine(task, OptimizerConfig(), engine_config(order.deepspeed, plan, clip=0.0))
        heard.collectives.clear()
        task.start_step(0.4)
        losses = engine(batch)
        end_of("forward")
        engine.backward(sum(losses.values()))
        end_of("backward")
        engine.step()
        end_of("optimizer")
        applied = engine.was_step_applied()
        task.finish_step(applied)
        clamp_temperature(engine)
        end_of("queues")
        engine.destroy()
    fake_ranks.leave()
    if not applied:
        raise RuntimeError("DeepSpeed has skipped the step")
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    return {"accelerator": get_accelerator().device_name(), "trained": trained, **asked}


def blank_task(order: Order) -> Pretraining:
    """On the meta device. Its queues, which are never sent, are long enough for the features of all ranks. Nothing is
    dropped out, which would cost time and send nothing."""
    from benchmarks import workload

    config = workload.preset(order.preset, dropout=0.0)
    return _blank(config.model_copy(update={"queue_size": max(config.queue_size, order.batch * order.world)}))


@lru_cache
def _blank(config: ModelConfig) -> Pretraining:
    import torch

    from albef_ds.tasks.pretraining import Pretraining

    with torch.device("meta"):
        return Pretraining(config).train()


def put(blank: Pretraining, machine: Machine) -> Pretraining:
    """A copy on the machine, which takes less time than to make another one."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensor

    device = torch.device(machine.device)
    there: dict[int, torch.Tensor] = {}
    for tensor in (*blank.parameters(), *blank.buffers()):
        new = FakeTensor(machine.mode, tensor, device)
        there[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(blank, there)


@lru_cache
def batch_of(preset: str, batch: int, machine: Machine) -> PretrainingBatch:
    from benchmarks import workload

    return machine.move(workload.captions_batch(workload.preset(preset), "mean14", batch))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Autograd's threads of a GPU may let go of a tensor while Python ends, which aborts a process that is done.
    os._exit(status)
