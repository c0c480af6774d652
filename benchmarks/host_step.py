"""One training step without its arithmetic, in a process of its own: what benchmarks.host starts and asks.

    python -m benchmarks.other_checkout FOLDER benchmarks.host_step FOLDER PRESET DEEPSPEED STAGE WORLD DESCRIPTOR

It reads "counts" or "step" from its standard input, a line each, and writes a line of JSON to the file DESCRIPTOR.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import deepspeed
import torch
from torch import Tensor

from albef_ds.model import attention  # before the tasks, which may take functions out of it
from benchmarks import PHASES, collectives, fake_ranks, other_checkout, workload
from benchmarks.counting import OperatorCount

ALPHA = 0.4
LENGTHS = (9, 11, 13, 15)  # tokens of each sample's caption; more samples cost arithmetic and change no count
WARMUP = 3  # steps; the second one still fills caches
HARNESS = f"{Path(__file__).parent}{os.sep}"  # whose calls are not the step's


class NoAttention(torch.autograd.Function):
    """In place of flash-attn's kernels: as many tensors in, out and kept; zeros for results."""

    @staticmethod
    def forward(ctx, cu_seqlens: Tensor, *rows: Tensor) -> Tensor:
        """rows: q, k, v, each [T, H, d]; or all in one, [T, 3, H, d]."""
        ctx.save_for_backward(cu_seqlens, *rows)
        first = rows[0]
        return first.new_zeros(first.shape if len(rows) == 3 else (first.shape[0], *first.shape[2:]))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *map(torch.zeros_like, ctx.saved_tensors[1:])


def no_contrast(image, text, image_m, text_m, image_queue, text_queue, temperature, *_) -> tuple[Tensor, ...]:
    """In place of ITC's arithmetic: the loss, both similarities, three gradients; all zero."""
    pairs = (image.shape[0], image.shape[0])
    return tuple(map(torch.zeros, ((), pairs, pairs, image.shape, text.shape, temperature.shape)))


def leave_out_arithmetic() -> None:
    """Attention and ITC compute nothing, and rows stay packed as they do on a GPU. Once a process, for good."""
    # A cache as the real one: a look into it is no Python call.
    attention.resolve_backend = functools.lru_cache(lambda *_, **__: "flash")
    from albef_ds.kernels import queue_contrastive_torch
    from albef_ds.tasks.contrastive import Contrastive

    flash = ModuleType("flash_attn")
    flash.__spec__ = ModuleSpec("flash_attn", None)
    flash.flash_attn_varlen_func = lambda q, k, v, cu_seqlens, *_, **__: NoAttention.apply(cu_seqlens, q, k, v)
    flash.flash_attn_varlen_qkvpacked_func = lambda qkv, cu_seqlens, *_, **__: NoAttention.apply(cu_seqlens, qkv)
    sys.modules["flash_attn"] = flash
    queue_contrastive_torch.forward = no_contrast
    Contrastive.room = lambda self, tokens, _: tokens  # the CPU counts them, a GPU is not waited for
    # A CPU's way to sum over ranks, compiled at its first use. (deepspeed.comm.torch is torch, by an import there.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def narrow(preset: str):
    """A model of the preset's depth and heads, of 4 numbers each, on images of 4 patches."""
    from benchmarks import flops

    config = flops.narrowed(workload.preset(preset))
    vision, text = config.vision, config.text
    small = vision.model_copy(update={"image_size": 2 * vision.patch_size}), text.model_copy(update={"vocab_size": 503})
    return config.model_copy(update={"vision": small[0], "text": small[1], "embed_dim": 32, "queue_size": 64})


def configuration(name: str, stage: int) -> dict:
    """A file of ds_configs at another stage."""
    given = json.loads((collectives.CONFIGURATIONS / f"{name}.json").read_text())
    given.pop("_comment", None)
    given["zero_optimization"] |= {"stage": stage, "overlap_comm": False}  # the CPU has no second stream
    return given


def build(preset: str, deepspeed_json: dict, world: int) -> Step:
    """DeepSpeed's engine as one rank of `world`, nobody on the other side. Once a process: the group stays."""
    leave_out_arithmetic()
    from albef_ds.config import BatchPlan, OptimizerConfig
    from albef_ds.tasks.pretraining import Pretraining
    from albef_ds.training.engine import build_engine, engine_config

    fake_ranks.join(0, world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    micro, config = len(LENGTHS), narrow(preset)
    plan = BatchPlan(global_batch=micro * world, micro_batch=micro, accumulation=1, world_size=world)
    task = Pretraining(config).train()
    engine = build_engine(task, OptimizerConfig(), engine_config(deepspeed_json, plan, clip=0.0))
    return Step(engine, workload.make_batch(config, list(LENGTHS)))


@dataclass
class Step:
    """A whole step, in the order of albef_ds/training/loop.py, on one batch."""

    engine: deepspeed.DeepSpeedEngine
    batch: object

    def __call__(self) -> dict[str, float]:
        """Runs it: milliseconds of this thread's processor time, by phase."""
        from albef_ds.training.engine import clamp_temperature, set_learning_rate

        now, engine, task = time.thread_time, self.engine, self.engine.module
        borders = [now()]
        set_learning_rate(engine, 1e-4)
        task.start_step(ALPHA)
        borders.append(now())
        total = sum(engine(self.batch).values())
        borders.append(now())
        engine.backward(total)
        borders.append(now())
        engine.step()
        borders.append(now())
        task.finish_step(engine.was_step_applied())
        clamp_temperature(engine)
        borders.append(now())
        return {phase: 1e3 * (end - start) for phase, start, end in zip(PHASES, borders, borders[1:], strict=False)}

    def after_another(self) -> dict[str, float]:
        """The second of two steps: the first brings back into the caches what another process has put out of them."""
        self()
        return self()

    def warm_up(self) -> None:
        """Raises RuntimeError where DeepSpeed skips a step: what is skipped is not measured."""
        for _ in range(WARMUP):
            self()
            if not self.engine.was_step_applied():
                raise RuntimeError("DeepSpeed skipped a step: its gradients were not finite")

    @property
    def trained(self) -> int:
        return sum(parameter.requires_grad for parameter in self.engine.module.parameters())


class Operators(OperatorCount):
    """Counts those apart that only look at memory in another way, and launch nothing on a GPU."""

    views = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.views += func.is_view
        return super().__torch_dispatch__(func, types, args, kwargs)


def operators(call: Callable) -> dict[str, int]:
    """Operators that one call dispatches."""
    with Operators() as counted:
        call()
    return {"operators": counted.total, "operators without views": counted.total - counted.views}


def python_calls(call: Callable, places: Mapping[str, str]) -> dict[str, int]:
    """Calls of Python functions (and resumptions of generators) within one call, by package; "other" are the rest.

    Args:
        places: what the files of a package begin with, to its name. Calls of this folder are not counted.
    """
    files: Counter[str] = Counter()

    def saw(frame, event: str, _) -> None:
        if event == "call":
            files[frame.f_code.co_filename] += 1

    sys.setprofile(saw)
    try:
        call()
    finally:
        sys.setprofile(None)
    found = dict.fromkeys([*places.values(), "other"], 0)
    for file, count in files.items():
        if not file.startswith(HARNESS):
            found[next((name for start, name in places.items() if file.startswith(start)), "other")] += count
    return found


def repeated(count: Callable[[], dict[str, int]]) -> dict[str, int]:
    """A count that two calls agree on; without the garbage collector, whose finalisers call what they like.

    Raises:
        RuntimeError: they do not agree; says where.
    """
    gc.collect()
    gc.disable()
    try:
        first, second = count(), count()
    finally:
        gc.enable()
    if first != second:
        differing = {name: (first[name], second[name]) for name in first if first[name] != second[name]}
        raise RuntimeError(f"two steps, one after the other, differ in what they count: {differing}")
    return first


def counts(step: Step, folder: Path) -> dict:
    """What a step counts, and where its code was imported from."""
    homes = {f"{Path(module.__file__).parent}{os.sep}": module.__name__ for module in (deepspeed, torch)}
    ours = other_checkout.imported(folder)
    homes |= {f"{place}{os.sep}": other_checkout.PACKAGE for place in ours}
    calls = repeated(lambda: python_calls(step, homes))
    return {
        "python calls": sum(calls.values()),
        "python calls in deepspeed": calls["deepspeed"],
        "python calls by package": calls,
        **repeated(lambda: operators(step)),
        "trained tensors": step.trained,
        "imported from": ours,
    }


def main() -> None:
    """The command line in this file's head."""
    folder, preset, name, stage, world, descriptor = sys.argv[1:]
    step = build(preset, configuration(name, int(stage)), int(world))
    step.warm_up()
    answers = {"counts": lambda: counts(step, Path(folder)), "step": step.after_another}
    with os.fdopen(int(descriptor), "w") as out:
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), file=out, flush=True)


if __name__ == "__main__":
    main()
