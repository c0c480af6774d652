"""The rivals of benchmarks.step: whole training steps (forward, backward, optimiser, teacher, queue) on one batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from albef_ds.config import ModelConfig, OptimizerConfig
from albef_ds.data.batch import Movable, PretrainingBatch
from albef_ds.tasks.registry import task_class
from albef_ds.tasks.task import Task
from albef_ds.training.optimizer import build_optimizer, parameter_groups
from benchmarks import PHASES
from benchmarks.reference import PaddedBatch, ReferenceALBEF

ALPHA = 0.4
OPTIMIZER = OptimizerConfig()
NAMES = ("ours fp32", "ours bf16", "ours bf16 apex", "reference", "modernised")


@dataclass(frozen=True)
class Place:
    """Where a contender computes, and how models and batches come there."""

    device: torch.device
    compile_layers: bool = False  # of the modernised rival

    @classmethod
    def of(cls, device: torch.device) -> Place:
        # On a CPU compiling takes many minutes: the modernised rival then has bf16 and SDPA alone.
        return cls(device, compile_layers=device.type == "cuda")

    def model(self, make: Callable[[], nn.Module]) -> nn.Module:
        return make().to(self.device)

    def batch(self, batch: Movable) -> Movable:
        return batch.to(self.device)


class PhaseClock:
    """Seconds of each phase of a step; an inner phase is taken out of the one around it.

    On a GPU every border waits for the device, so phases are timed in steps of their own, not in those compared.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._inner = device, dict.fromkeys(PHASES, 0.0), 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start, around, self._inner = self._now(), self._inner, 0.0
        yield
        spent = self._now() - start
        self.seconds[phase] += spent - self._inner
        self._inner = around + spent

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def no_clock(phase: str):
    return contextlib.nullcontext()


@dataclass
class Contender:
    """`step(clock)` runs one whole step on the contender's batch."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Callable], dict]
    set_batch: Callable[[Movable], None]

    def __call__(self) -> dict:
        return self.step(no_clock)

    def phases(self, device: torch.device, steps: int = 3) -> dict[str, float]:
        """Milliseconds of each phase, the mean of `steps` steps."""
        clock = PhaseClock(device)
        for _ in range(steps):
            self.step(clock)
        return {name: 1e3 * seconds / steps for name, seconds in clock.seconds.items()}

    def state_bytes(self) -> int:
        """Parameters, gradients, two moments and buffers: what a step holds apart from its activations."""
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        frozen = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
        return 4 * trained + frozen + sum(b.numel() * b.element_size() for b in self.model.buffers())


def build(
    name: str,
    config: ModelConfig,
    place: torch.device | Place,
    batch: Movable,
    weights_of: Contender | None = None,
    task: str = "pretraining",
) -> Contender:
    """The contender of that name (NAMES), its weights drawn from the same seed, with `batch` set.

    Args:
        weights_of: another precision of ours, whose weights and optimiser are then shared to save memory.
        task: what is learnt; the reference and the modernised one know pre-training alone.

    Raises:
        ValueError: an unknown contender, or one that does not know the task.
    """
    if name not in NAMES:
        raise ValueError(f"unknown contender {name!r}; choose from {', '.join(NAMES)}")
    torch.manual_seed(0)
    place = place if isinstance(place, Place) else Place.of(place)
    if name.startswith("ours"):
        model = weights_of.model if weights_of else place.model(lambda: task_class(task)(config)).train()
        found = _ours(name, model, place, weights_of)
    elif task != "pretraining":
        raise ValueError(f"{name!r} knows pre-training alone, not {task!r}; choose ours")
    else:
        found = _reference(name, config, place)
    found.set_batch(batch)
    return found


def _ours(name: str, task: Task, place: Place, weights_of: Contender | None) -> Contender:
    kernel = "apex" if name.endswith("apex") else OPTIMIZER.fused
    optimizer = weights_of.optimizer if weights_of else build_optimizer(task, OPTIMIZER, kernel)
    given: dict[str, Movable] = {}
    half = "bf16" in name

    def step(clock) -> dict:
        with arithmetic(place.device, half, tf32=False):
            with clock("teacher"):
                task.start_step(ALPHA)
            with clock("forward"):
                losses = task(given["batch"])
                total = sum(losses.values())
        with clock("backward"):
            total.backward()
        with clock("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
            task.clamp_temperature()
        with clock("queue"):
            task.finish_step()
        return losses

    return Contender(name, task, optimizer, step, lambda batch: given.update(batch=place.batch(batch)))


def _reference(name: str, config: ModelConfig, place: Place) -> Contender:
    modern = name == "modernised"
    device, compiled = place.device, place.compile_layers
    model = place.model(lambda: ReferenceALBEF(config, modernised=modern, compile_layers=compiled)).train()
    groups = parameter_groups(model, OPTIMIZER.weight_decay)
    # PyTorch of the reference's time updated one parameter after another; the modernised rival takes today's best.
    speed = {"fused": device.type == "cuda"} if modern else {"foreach": False}
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, **speed)
    given: dict[str, PaddedBatch] = {}
    move_teacher, enqueue = model.move_teacher, model.enqueue

    def step(clock) -> dict:
        def timed(phase, method):
            def call(*args):
                with clock(phase):
                    method(*args)

            return call

        model.move_teacher, model.enqueue = timed("teacher", move_teacher), timed("queue", enqueue)
        with arithmetic(device, modern, tf32=True):
            with clock("forward"):
                losses = model(given["batch"], ALPHA)
                total = sum(losses.values())
            with clock("backward"):
                total.backward()
        with clock("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def set_batch(batch: PretrainingBatch) -> None:
        if len(batch) < 2:  # on a GPU its draw would end CUDA for all that come after it
            raise ValueError("the reference draws negatives from its own batch, which needs at least 2 samples")
        given.update(batch=place.batch(PaddedBatch.from_packed(batch)))

    return Contender(name, model, optimizer, step, set_batch)


@contextlib.contextmanager
def arithmetic(device: torch.device, bf16: bool, tf32: bool):
    """bf16 autocast where asked for; TF32 products of fp32 tensors on a GPU, as PyTorch had by default until 1.11."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
