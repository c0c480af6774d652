"""The training steps that are rehearsed: every task under every attention backend, and the options that change a step.

Two steps each, of two batches with texts of different lengths. All is small but the heads' 64 numbers, which kernels
are chosen by.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from albef_ds.config import ModelConfig, OptimizerConfig, OptionsConfig, TextConfig, VisionConfig
from albef_ds.data.batch import Movable
from albef_ds.tasks.registry import task_class
from albef_ds.tasks.task import Task
from albef_ds.training.compile import compile_regions
from albef_ds.training.flops import FlopCount
from albef_ds.training.optimizer import build_optimizer
from benchmarks import fake_gpu, workload
from tests.rehearsal.strict import Strict

TASKS = ("pretraining", "retrieval", "vqa", "entailment", "nlvr", "text_assignment")
LENGTHS = ((9, 3, 14, 25), (7, 8, 21, 2))  # tokens of each text, in the first step and in the second


@dataclass(frozen=True)
class Case:
    task: str
    backend: str = "flash"
    note: str = ""  # what is unlike the other cases of the task and backend
    dropout: float = 0.1
    dtype: str = "bfloat16"
    flash_attn: bool = True  # whether it is installed
    checkpointing: bool = False
    compiled: bool = False
    optimizer: str = "adamw"
    model: dict = field(default_factory=dict)  # of ModelConfig
    drop_path: float = 0.0

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.task, self.backend, self.note)))

    def config(self) -> ModelConfig:
        vision = VisionConfig(image_size=32, width=128, layers=2, heads=2, drop_path=self.drop_path)
        text = TextConfig(
            vocab_size=2003,
            width=128,
            layers=3,
            fusion_layer=1,
            heads=2,
            mlp_width=256,
            dropout=self.dropout,
            attention_dropout=self.dropout,
        )
        return ModelConfig(vision=vision, text=text, embed_dim=32, queue_size=128, attention=self.backend, **self.model)

    @property
    def kernel(self) -> str | None:
        """The operator by which one knows the backend; None: it has none of its own."""
        backend = self.backend
        if backend == "auto":
            backend = "flash" if self.flash_attn else "varlen"
        return KERNELS.get((backend, self.dropout > 0))


KERNELS = {  # by backend, and whether there is dropout
    ("flash", True): "flash_attn::_flash_attn_varlen_forward",
    ("flash", False): "flash_attn::_flash_attn_varlen_forward",
    ("varlen", True): "aten::_flash_attention_forward",
    ("varlen", False): "torch_attn::_varlen_attn",
    ("efficient", True): "aten::_scaled_dot_product_efficient_attention",  # dropout it knows of padded rows alone
    ("efficient", False): "aten::_efficient_attention_forward",
}


def _options(**options) -> dict:
    return {"options": OptionsConfig(**options)}


CASES = (
    *(Case(task, backend) for backend in ("flash", "varlen", "efficient", "sdpa", "eager") for task in TASKS),
    # Other operators compute attention where there is no dropout.
    *(Case(task, "varlen", "no-dropout", dropout=0.0) for task in ("pretraining", "vqa", "nlvr")),
    *(Case(task, "efficient", "no-dropout", dropout=0.0) for task in ("pretraining", "vqa", "nlvr")),
    Case("pretraining", "auto"),
    # The default installation has no flash-attn.
    Case("pretraining", "auto", "plain", flash_attn=False),
    Case("retrieval", "auto", "plain-no-dropout", flash_attn=False, dropout=0.0),
    *(Case(task, "flash", "checkpointing", checkpointing=True) for task in ("pretraining", "vqa")),
    *(Case(task, "efficient", "checkpointing", checkpointing=True) for task in ("nlvr", "text_assignment")),
    Case("pretraining", "flash", "token-drop", model=_options(token_drop=0.5)),
    Case("retrieval", "efficient", "token-drop", model=_options(token_drop=0.5)),
    Case("pretraining", "flash", "mixgen", model=_options(mixgen=0.25)),
    Case("retrieval", "efficient", "mixgen", model=_options(mixgen=0.25)),
    Case("vqa", "flash", "no-teacher", model={"distill": False}),
    Case("entailment", "flash", "no-teacher", model={"distill": False}),
    Case("pretraining", "flash", "fp16", dtype="float16"),
    Case("vqa", "efficient", "fp16", dtype="float16"),
    Case("pretraining", "flash", "drop-path", drop_path=0.1),
    Case("pretraining", "flash", "muon", optimizer="muon"),
    Case("pretraining", "flash", "compiled", compiled=True),
)


def rehearse(case: Case) -> int | None:
    """Two optimiser steps; raises what a GPU would raise, or make wait for.

    Returns:
        Their FLOPs, as a run counts them; None where the regions are compiled.

    Raises:
        AssertionError: a loss or a gradient is missing or not what it should be, or another kernel computed attention.
    """
    config = case.config()
    task = task_class(case.task)(config).train()
    if case.checkpointing:
        task.model.enable_checkpointing()
    batches = [fake_gpu.move(batch_of_turn(case.task, config, turn)) for turn in range(2)]
    fake_gpu.to_gpu(task)
    with fake_gpu.install(), nullcontext() if case.flash_attn else fake_gpu.without_flash_attn():
        optimizer = build_optimizer(task, OptimizerConfig(name=case.optimizer))
        first, second = (partial(step, task, batch, optimizer, case.dtype) for batch in batches)
        second = partial(second, measuring=True)
        if case.compiled:
            return capture(task, first, second)
        with Strict() as strict, FlopCount() as flops:
            first()
            second()
    assert case.kernel is None or case.kernel in strict.seen, f"attention was not computed by {case.kernel}"
    return flops.total


def step(task: Task, batch: Movable, optimizer: torch.optim.Optimizer, dtype: str, measuring: bool = False) -> None:
    """As training/loop.py has it, without DeepSpeed."""
    task.start_step(0.4, measuring)
    with torch.autocast("cuda", getattr(torch, dtype)):
        losses = task(batch)
    for name, value in (losses | task.measures).items():
        assert value.is_cuda and value.dim() == 0, f"{name} is {list(value.shape)} on {value.device}"
        assert value.dtype == torch.float32 or name not in losses, f"the loss {name} is in {value.dtype}"
    sum(losses.values()).backward()
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
    optimizer.step()
    optimizer.zero_grad()
    task.finish_step()
    task.clamp_temperature()
    task.measures.clear()


def capture(task: Task, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Two steps with the regions that training compiles, captured and differentiated as for Inductor, which does not
    follow. A graph break is an error, and so is anything captured anew in the second step."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep)
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True)):
        compile_regions(task)
    first()
    assert graphs, "no region was captured"
    with mock.patch.object(torch._dynamo.config, "error_on_recompile", True):
        second()


def batch_of_turn(task: str, config: ModelConfig, turn: int) -> Movable:
    """Fine-tuning has one text to an image in the first step, and two in the second."""
    return workload.task_batch(task, config, LENGTHS[turn], seed=turn, texts_an_image=1 + turn)
