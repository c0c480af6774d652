"""Memory and disk: the estimates against the real model and real steps, and what is judged by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from albef_ds.config import load_config, plan_batches
from albef_ds.doctor import sizes
from albef_ds.doctor.finding import Finding
from albef_ds.tasks.registry import TASKS
from albef_ds.training.dry_run import synthetic_batch
from tests.training_run import write_recipe

SHAPE = """model: {embed_dim: 32, queue_size: 64,
  vision: {width: 64, layers: 3, heads: 2, patch_size: 8, image_size: 48},
  text: {width: 64, layers: 4, fusion_layer: 2, heads: 2, mlp_width: 256, vocab_size: 200, max_positions: 64}}
train: {global_batch: 16}"""


def shaped(tmp_path: Path, *overrides: str):
    (tmp_path / "shape.yaml").write_text(SHAPE)
    return load_config(tmp_path / "shape.yaml", overrides)


def kept_for_backward(config, samples: int, autocast: bool) -> int:
    """Bytes of the distinct tensors that a real step keeps, without parameters and buffers."""
    task = TASKS[config.task](config.model)
    if config.train.activation_checkpointing:
        task.model.enable_checkpointing()
    own = {t.untyped_storage().data_ptr() for t in (*task.parameters(), *task.buffers())}
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    task.start_step(0.4)
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = task(synthetic_batch(config, samples, 3, 2))  # they hold the graph, and the graph the tensors
        assert losses
    return sum(size for pointer, size in seen.items() if pointer not in own)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_estimate_of_activations_is_near_what_a_step_keeps(tmp_path, task, autocast):
    # The kernels of a GPU keep no probabilities; of a CPU's ways to compute attention this one keeps none either.
    config = shaped(tmp_path, f"task={task}", "model.attention=sdpa")
    measured = (kept_for_backward(config, 8, autocast) - kept_for_backward(config, 4, autocast)) / 4
    assert 0.7 < sizes.activation_bytes(config, autocast) / measured < 1.5


def test_checkpointed_activations_are_less_and_the_estimate_knows(tmp_path):
    config = shaped(tmp_path, "train.activation_checkpointing=true", "model.attention=sdpa")
    measured = (kept_for_backward(config, 8, True) - kept_for_backward(config, 4, True)) / 4
    assert measured < sizes.activation_bytes(config, True) < sizes.activation_bytes(shaped(tmp_path), True)


def test_sizes_are_those_of_the_real_model(tmp_path):
    config = shaped(tmp_path)
    task = TASKS["pretraining"](config.model)
    found = sizes.sizes_of(config)
    assert found.student == sum(p.numel() for p in task.model.parameters())
    assert found.teacher == sum(p.numel() for p in task.teacher.parameters())
    assert found.queues == sum(b.numel() * b.element_size() for b in task.buffers())


ZERO2 = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}}
OFFLOAD = {"zero_optimization": ZERO2["zero_optimization"] | {"offload_optimizer": {"device": "cpu"}}}


def test_state_is_the_dry_runs_arithmetic_divided_among_the_ranks(tmp_path):
    config, model = shaped(tmp_path), sizes.Sizes(student=1000, teacher=1000, queues=64)
    plan = plan_batches(config, 4)
    assert sizes.estimate(config, ZERO2, plan, model).state == 4000 + 4000 + 64 + 16 * 1000 / 4
    assert sizes.estimate(config, OFFLOAD, plan, model).state == 4000 + 4000 + 64 + 4 * 1000 / 4
    autocast = ZERO2 | {"torch_autocast": {"enabled": True}}
    assert sizes.estimate(config, autocast, plan, model).state == 4000 + 4000 + 64 + 4000 + 2 * 2000
    assert sizes.estimate(config, ZERO2, plan, model).buckets == 8000
    assert model.checkpoint == 8000 + 64 + 12000


def test_memory_that_does_not_suffice_and_what_would(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "CONTEXT", 0)  # it would outweigh so small a model
    config, model = shaped(tmp_path), sizes.Sizes(student=1000, teacher=1000, queues=0)
    plan = plan_batches(config, 1)  # 16 samples
    needed = sizes.estimate(config, ZERO2, plan, model, 0).total
    one = sizes.activation_bytes(config, False)

    def found(room: float, settings=config) -> Finding:
        return sizes.check_memory(settings, ZERO2, plan, model, int(room))

    assert found(needed / sizes.TIGHT + 100).state == "ok"
    tight = found(needed + 100)
    assert tight.state == "warning" and "train.micro_batch=" in tight.advice
    assert found(needed - 100).state == "problem"
    exactly_four = (needed - 12 * one) / sizes.TIGHT + 100
    assert found(exactly_four).advice.startswith("train.micro_batch=4 ")
    assert found(2).advice.startswith("train.activation_checkpointing=true")
    assert "zero2_offload" in found(1, shaped(tmp_path, "train.activation_checkpointing=true")).advice
    unknown = sizes.check_memory(config, ZERO2, plan, model, None)
    assert unknown.state == "ok" and "estimate" in unknown.text


def test_room_on_the_disk_and_its_speed(tmp_path):
    config = load_config(write_recipe(tmp_path, checkpoint={"keep": 2, "keep_every": 100}))
    assert sizes.kept(config, 1050) == 13 and sizes.kept(config, None) == 3
    assert sizes.judge_disk(tmp_path, 12 * 10**9, 10**8, 13, 10**9).state == "problem"
    assert sizes.judge_disk(tmp_path, 14 * 10**9, 10**8, 13, 10**9).state == "ok"
    assert sizes.judge_disk(tmp_path, 14 * 10**9, 10**6, 13, 10**9).state == "warning"
    assert sizes.write_speed(tmp_path, 2**20) > 0
    assert sizes.check_host_memory(sizes.Sizes(100, 100, 0), 1999, 8, 8).state == "warning"
    assert sizes.check_host_memory(sizes.Sizes(100, 100, 0), 2000, 8, 8).state == "ok"
