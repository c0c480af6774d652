"""Rehearsals with something broken on purpose: each must be seen, or the others prove nothing."""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from albef_ds.data.batch import Loaded
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.tasks.task import Task
from benchmarks import fake_gpu
from benchmarks.fake_streams import Stream
from tests.rehearsal.deepspeed_cases import Rehearsal


class Curious(Rehearsal):
    """The task looks at one of its losses."""

    def task(self) -> Task:
        class CuriousTask(Pretraining):
            def forward(self, batch):
                losses = super().forward(batch)
                losses["itc"].item()
                return losses

        with torch.device("meta"):
            return CuriousTask(self.case.model).train()


class Copying(Rehearsal):
    """The loop copies a weight to the host."""

    def step(self, engine: DeepSpeedEngine, *rest) -> list[str]:
        engine.module.model.itm_head.weight.cpu()
        return super().step(engine, *rest)


class Lonely(Rehearsal):
    """Rank 0 asks the others for something that they know nothing of."""

    def step(self, engine: DeepSpeedEngine, *rest) -> list[str]:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.zeros(1, device="cuda"))
        return super().step(engine, *rest)


class Crosswise(Rehearsal):
    """All ranks sum a transposed matrix."""

    def step(self, engine: DeepSpeedEngine, *rest) -> list[str]:
        dist.all_reduce(engine.module.model.itm_head.weight.detach().T)
        return super().step(engine, *rest)


class LeftBehind(Rehearsal):
    """The masked words' positions stay on the host."""

    def batch(self) -> Loaded:
        batch = super().batch()
        with fake_gpu.install():
            positions = torch.empty(batch.masked.positions.shape, dtype=torch.int64)
        return dataclasses.replace(batch, masked=dataclasses.replace(batch.masked, positions=positions))


class Misspelt(Rehearsal):
    """A key of the configuration has lost a letter."""

    def deepspeed_json(self) -> dict:
        given = super().deepspeed_json()
        given["zero_optimization"]["reduce_bucket_siz"] = given["zero_optimization"].pop("reduce_bucket_size")
        return given


class Rounded(Rehearsal):
    """One layer is kept in bf16, which DeepSpeed does not mind: it makes it fp32 without a word."""

    def task(self) -> Task:
        task = super().task()
        task.model.itm_head.to(torch.bfloat16)
        return task


class Pointlike(Rehearsal):
    """The temperature has no dimension, as in the reference."""

    def task(self) -> Task:
        task = super().task()
        task.model.temp = torch.nn.Parameter(torch.empty((), device="meta"))
        return task


class Coarse(Rehearsal):
    """A loss leaves the task in bf16."""

    def task(self) -> Task:
        task = super().task()
        task.matching = lambda *args: type(task).matching(task, *args).bfloat16()
        return task


class Hasty(Rehearsal):
    """No stream waits for another one."""

    def run(self) -> dict:
        with mock.patch.object(Stream, "wait_stream"), mock.patch.object(Stream, "wait_event"):
            return super().run()


FAULTS = {fault.__name__: fault for fault in Rehearsal.__subclasses__()}
