"""A tiny run with checkpoints, without recipe, data or loop: what the tests of checkpoints start on real ranks.

Step s trains on the same MICRO x PARTS samples whatever the number of ranks: with two ranks each has one micro-batch of
them, with one rank it accumulates both, in the same order. ITC and hard negatives see a micro-batch alone: only equal
micro-batches can give equal losses.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from albef_ds.config import BatchPlan, CheckpointConfig, OptimizerConfig
from albef_ds.tasks.pretraining import Pretraining
from tests.golden_cases import most_likely_negative
from tests.tiny import tiny_batch, tiny_model

MICRO, PARTS = 3, 2
IDENTITY = {"task": "pretraining", "model": tiny_model().model_dump(mode="json"), "train": {"seed": 3}}
ADAMW, MUON = OptimizerConfig(lr=1e-3), OptimizerConfig(name="muon", lr=1e-3, muon_lr_ratio=1.0)


def build(dropout: float = 0.0, optimizer: OptimizerConfig = ADAMW):
    """The engine of this rank."""
    from albef_ds.training.engine import build_engine, engine_config, init_distributed

    _, world_size, _ = init_distributed()
    torch.manual_seed(0)
    task = Pretraining(tiny_model(dropout), sample_negatives=most_likely_negative)
    torch.manual_seed(1 + dist.get_rank())
    plan = BatchPlan(
        global_batch=MICRO * PARTS, micro_batch=MICRO, accumulation=PARTS // world_size, world_size=world_size
    )
    json = {"zero_optimization": {"stage": 2, "contiguous_gradients": True}}
    return build_engine(task, optimizer, engine_config(json, plan, clip=0.5))


def train_step(engine, step: int) -> float:
    """Step `step`, counted from 1; this rank's mean loss."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    task, total = engine.module, 0.0
    task.train()
    task.start_step(alpha=0.3)
    mine = range(PARTS)[rank * PARTS // world_size : (rank + 1) * PARTS // world_size]
    for part in mine:
        losses = engine(tiny_batch(MICRO, seed=100 * step + part))
        engine.backward(sum(losses.values()))
        engine.step()
        total += sum(loss.item() for loss in losses.values()) / len(mine)
    task.finish_step(engine.was_step_applied())
    return total


def open_checkpoints(folder: Path, wait: float = 0.02, **settings):
    from albef_ds.training.checkpoint import Checkpoints

    return Checkpoints(folder, CheckpointConfig(**settings), IDENTITY, config={"name": "tiny"}, wait=wait)


def run_part(
    folder: str, last: int, saved: tuple[int, ...], dropout: float = 0.0, optimizer: OptimizerConfig = ADAMW
) -> dict:
    """Resumes from the newest checkpoint, or starts; trains to step `last`, saving after the steps `saved`."""
    engine = build(dropout, optimizer)
    checkpoints = open_checkpoints(Path(folder), keep=9)
    newest = checkpoints.newest()
    start = checkpoints.load(engine, newest) if newest else 0
    restored = full_state(engine)
    losses = {}
    for step in range(start + 1, last + 1):
        losses[step] = train_step(engine, step)
        if step in saved:
            checkpoints.save(engine, step)
    checkpoints.finish()
    return {
        "start": start,
        "losses": losses,
        "restored": restored,
        "final": full_state(engine),
        "random": torch.rand(4),
        "blocked": [timing.blocked_s for timing in checkpoints.timings],
    }


def full_state(engine) -> dict[str, torch.Tensor]:
    """Everything that training goes on from: the module's state, and this rank's slices of masters and moments."""
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    for i, master in enumerate(engine.optimizer.single_partition_of_fp32_groups):
        state[f"master {i}"] = master.detach().clone()
        for name, value in engine.optimizer.optimizer.state[master].items():
            state[f"{name} {i}"] = torch.as_tensor(value).clone()
    return state
