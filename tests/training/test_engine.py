"""The engine against plain PyTorch: ZeRO-2 equals DDP, the teacher moves as it should, the temperature stays in."""

from __future__ import annotations

import pytest
import torch

from albef_ds.config import BatchPlan, ConfigError, OptimizerConfig
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.training.engine import engine_config
from tests.golden_cases import most_likely_negative
from tests.ranks import run_ranks
from tests.tiny import tiny_batch, tiny_model

OPTIMIZER = OptimizerConfig(lr=1e-3)
MUON = OptimizerConfig(name="muon", lr=1e-3, muon_lr_ratio=1.0)
MICRO, STEPS = 3, 5


def build_task(**changes) -> Pretraining:
    torch.manual_seed(0)
    return Pretraining(tiny_model(**changes), sample_negatives=most_likely_negative)


def build_zero2(task, world_size: int, accumulation: int = 1, clip: float = 0.0, optimizer=OPTIMIZER, **zero):
    from albef_ds.training.engine import build_engine

    plan = BatchPlan(
        global_batch=MICRO * accumulation * world_size,
        micro_batch=MICRO,
        accumulation=accumulation,
        world_size=world_size,
    )
    json = {"zero_optimization": {"stage": 2, "contiguous_gradients": True, **zero}}
    return build_engine(task, optimizer, engine_config(json, plan, clip))


def run_zero2(zero: dict, accumulation: int, clip: float, optimizer: OptimizerConfig) -> dict[str, torch.Tensor]:
    from albef_ds.training.engine import clamp_temperature, init_distributed

    rank, world_size, _ = init_distributed()
    engine = build_zero2(build_task(), world_size, accumulation, clip, optimizer, **zero)
    task = engine.module
    for step in range(STEPS):
        task.start_step(alpha=0.3)
        for micro in range(accumulation):
            losses = engine(tiny_batch(MICRO, seed=100 * step + 10 * micro + rank))
            engine.backward(sum(losses.values()))
            engine.step()
        task.finish_step(engine.was_step_applied())
        clamp_temperature(engine)
    return {name: value.clone() for name, value in task.state_dict().items()}


def run_ddp(accumulation: int, clip: float, config: OptimizerConfig) -> dict[str, torch.Tensor]:
    from albef_ds.training.engine import init_distributed
    from albef_ds.training.optimizer import build_optimizer

    rank, _, _ = init_distributed()
    task = build_task()
    model = torch.nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
    optimizer = build_optimizer(task, config)
    for step in range(STEPS):
        task.start_step(alpha=0.3)
        optimizer.zero_grad()
        for micro in range(accumulation):
            losses = model(tiny_batch(MICRO, seed=100 * step + 10 * micro + rank))
            (sum(losses.values()) / accumulation).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(task.parameters(), clip)
        optimizer.step()
        task.finish_step()
        task.clamp_temperature()
    return {name: value.clone() for name, value in task.state_dict().items()}


VARIANTS = {
    "plain": ({"overlap_comm": False}, 1, 0.0, OPTIMIZER),
    "overlap_comm": ({"overlap_comm": True}, 1, 0.0, OPTIMIZER),
    "overlap_comm, accumulation and clipping": ({"overlap_comm": True}, 2, 0.5, OPTIMIZER),
    "muon": ({"overlap_comm": True}, 2, 0.5, MUON),
}


def run_variants() -> dict[str, tuple[dict, dict]]:
    return {
        name: (run_zero2(zero, accumulation, clip, optimizer), run_ddp(accumulation, clip, optimizer))
        for name, (zero, accumulation, clip, optimizer) in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    return run_ranks(2, run_variants)


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero2_on_two_ranks_equals_ddp(two_ranks, variant):
    (ours, ddp), (theirs, _) = (rank[variant] for rank in two_ranks)
    initial = build_task().state_dict()
    assert ddp.keys() == ours.keys()
    for name, expected in ddp.items():
        assert torch.equal(ours[name], theirs[name]), f"{name} differs between the ranks"
        # fp32 sums in another order, amplified by AdamW where a gradient is near zero
        torch.testing.assert_close(ours[name], expected, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(ddp["model.itm_head.weight"], initial["model.itm_head.weight"])


def run_hot_temperature() -> list[float]:
    """A learning rate so high that the temperature leaves its bounds at every step."""
    from albef_ds.training.engine import clamp_temperature, init_distributed, set_learning_rate

    rank, world_size, _ = init_distributed()
    engine = build_zero2(build_task(temperature_min=0.06, temperature_max=0.08), world_size)
    seen = []
    for step in range(6):
        set_learning_rate(engine, 0.05)
        engine.module.start_step(alpha=0.0)
        losses = engine(tiny_batch(MICRO, seed=10 * step + rank))
        engine.backward(sum(losses.values()))
        engine.step()
        before = engine.module.model.temp.item()
        clamp_temperature(engine)
        seen.append((before, engine.module.model.temp.item()))
    return seen


def test_the_temperature_stays_within_its_bounds_under_zero2():
    first, second = run_ranks(2, run_hot_temperature)
    assert first == second
    assert any(not 0.06 <= before <= 0.08 for before, _ in first), "the test must push it out of bounds"
    for (_, kept), (following, _) in zip(first, first[1:], strict=False):
        assert 0.06 <= kept <= 0.08 + 1e-7
        # Adam's step is at most some lr: had the master kept the unclamped value, the next one would start from there.
        assert abs(following - kept) < 0.06


def test_the_teacher_moves_as_fp32_arithmetic_says_over_500_tiny_steps():
    task = build_task(momentum=0.995)
    start = {n: p.clone() for n, p in task.teacher.named_parameters()}
    with torch.no_grad():
        for p in task.model.parameters():
            p.mul_(1.01)
    for _ in range(500):
        task.start_step(alpha=0.0)
        task.finish_step(applied=True)
    student = dict(task.model.named_parameters())
    remaining = 0.995**500
    for name, moved in task.teacher.named_parameters():
        target = student[name].double()
        expected = target + remaining * (start[name].double() - target)
        # 500 roundings of half a unit in the last place each, on a way of 1 % of the value
        torch.testing.assert_close(moved.double(), expected, rtol=5e-5, atol=1e-7)


def test_a_bf16_teacher_would_not_have_moved():
    value, target = torch.ones(100, dtype=torch.bfloat16), torch.full((100,), 1.01, dtype=torch.bfloat16)
    for _ in range(500):
        value.lerp_(target, 0.005)
    assert torch.equal(value, torch.ones_like(value))


def test_a_skipped_step_leaves_teacher_and_queue_untouched():
    task = build_task()
    task.start_step(alpha=0.0)
    task(tiny_batch(3))
    task.finish_step(applied=True)
    with torch.no_grad():
        task.model.vision_proj.weight.add_(1.0)
    task.start_step(alpha=0.0)  # moves the teacher to where this step's student wants it
    task(tiny_batch(3, seed=1))
    before = {n: t.clone() for n, t in task.state_dict().items() if n.startswith(("teacher.", "queue."))}
    task.finish_step(applied=False)
    task.start_step(alpha=0.0)
    task(tiny_batch(3, seed=2))
    task.finish_step(applied=False)
    for name, value in before.items():
        assert torch.equal(task.state_dict()[name], value), name


def test_under_accumulation_the_teacher_moves_once_a_step_and_all_features_enter_the_queue():
    task = build_task(momentum=0.5)
    with torch.no_grad():
        task.model.vision_proj.weight.add_(1.0)
    start = task.teacher.vision_proj.weight.clone()
    task.start_step(alpha=0.0)
    for micro in range(3):
        task(tiny_batch(2, seed=micro))
    task.finish_step()
    torch.testing.assert_close(task.teacher.vision_proj.weight, start + 0.5)
    assert task.queue.pointer.item() == 6


def test_a_contradicting_batch_size_in_the_json_is_named():
    plan = BatchPlan(global_batch=8, micro_batch=4, accumulation=1, world_size=2)
    with pytest.raises(ConfigError, match="train_batch_size = 16, the recipe means 8"):
        engine_config({"train_batch_size": 16}, plan, clip=0.0)
