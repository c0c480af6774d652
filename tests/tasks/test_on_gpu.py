"""The steps of tests/rehearsal on a real GPU: they run, with the same losses, and nobody waits for it."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from albef_ds.config import OptimizerConfig
from albef_ds.model.attention import obstacle
from albef_ds.tasks.registry import task_class
from albef_ds.training.compile import compile_regions
from albef_ds.training.optimizer import build_optimizer
from benchmarks import fake_gpu
from tests.rehearsal.cases import CASES, TASKS, Case, batch_of_turn, step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DRAWN = {"itm", "ta"}  # losses of what was drawn by similarities, which backends round differently


@contextmanager
def no_waits():
    """Whatever PyTorch knows to wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def as_it_can_run(case: Case) -> Case:
    """The case, by another backend where its own is not there and not its point; skips where it is."""
    why = None if case.backend == "auto" else obstacle(case.backend, "cuda", getattr(torch, case.dtype), 64)
    if why and not case.note:
        pytest.skip(f"{case.backend} {why}")
    return replace(case, backend="auto") if why else case


def built(case: Case, turns: int):
    """The task on the GPU, and its batches."""
    config = case.config()
    torch.manual_seed(0)
    task = task_class(case.task)(config).train()
    if case.checkpointing:
        task.model.enable_checkpointing()
    if case.compiled:
        compile_regions(task)
    return task.cuda(), [batch_of_turn(case.task, config, turn % 2).to("cuda") for turn in range(turns)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_step_waits_for_the_gpu(case: Case):
    case = as_it_can_run(case)
    with nullcontext() if case.flash_attn else fake_gpu.without_flash_attn():
        task, batches = built(case, turns=4)
        optimizer = build_optimizer(task, OptimizerConfig(name=case.optimizer))
        for turn, batch in enumerate(batches):  # the first two compile kernels and make the optimiser's state
            with no_waits() if turn > 1 else nullcontext():
                step(task, batch, optimizer, case.dtype, measuring=turn % 2 == 1)
    assert all(torch.isfinite(p).all() for p in task.model.parameters())


@pytest.mark.parametrize("backend", ["flash", "varlen", "efficient", "sdpa", "auto"])
@pytest.mark.parametrize("task", TASKS)
def test_every_backend_gives_the_losses_of_eager_attention(task: str, backend: str):
    as_it_can_run(Case(task, backend, dropout=0.0))
    found = {}
    for name in (backend, "eager"):
        model, (batch,) = built(Case(task, name, dropout=0.0), turns=1)
        model.start_step(0.4)
        with torch.autocast("cuda", torch.bfloat16):
            found[name] = {k: v.item() for k, v in model(batch).items() if k not in DRAWN}
    assert found[backend] == pytest.approx(found["eager"], rel=2e-2)
