"""Our step against numbers recorded from the public reference (tests/golden/README.md), in fp32 on the CPU.

pytest tests/test_reference_parity.py --golden DIR      # DIR: the layout of tests/golden, any sizes
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from albef_ds.config import BatchPlan, OptimizerConfig
from albef_ds.data.batch import PackedText
from albef_ds.evaluation.answers import rank_answers
from albef_ds.model.reference_weights import to_reference
from albef_ds.training.optimizer import build_optimizer
from tests.golden_cases import GoldenCase
from tests.ranks import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECORDED_OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.02, betas=(0.9, 0.999), eps=1e-8)

# fp32 sums in another order: losses to 2e-5 relative, gradients to 1e-4 of their norm. AdamW turns the sign of a tiny
# gradient into a whole step, so weights get 2e-4 absolute (a step is 1e-3).
LOSS, GRADIENT, WEIGHT = 2e-5, 1e-4, 2e-4


def check_losses(found: dict[str, float], recorded: dict[str, float]) -> None:
    assert found.keys() == recorded.keys()
    for name, value in recorded.items():
        assert found[name] == pytest.approx(value, rel=LOSS), name


def check_final(case: GoldenCase, found: dict[str, torch.Tensor]) -> None:
    recorded = {k.removeprefix("final/"): torch.from_numpy(v) for k, v in case.arrays.items() if k.startswith("final/")}
    assert recorded, "the case holds no final weights"
    for name, value in recorded.items():
        torch.testing.assert_close(found[name], value, atol=WEIGHT, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("impl", ["torch", "triton"])  # Triton in its interpreter where there is no GPU
def test_pretrain_in_one_process(golden: Path, impl: str):
    case = GoldenCase(golden, "pretrain")
    task = case.build(impl).to(DEVICE)
    optimizer = build_optimizer(task, RECORDED_OPTIMIZER)
    for step in range(case.steps):
        task.start_step(case.alpha(step))
        task.clamp_temperature()
        losses = task(case.batch(step).to(DEVICE))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        check_losses({k: v.item() for k, v in losses.items()}, case.losses(step))
        if step == 0:
            check_gradients(case, task)
        optimizer.step()
        task.finish_step()
    check_final(case, to_reference(task.model, task.teacher, task.queue))


@pytest.mark.parametrize("name", ["retrieval", "vqa", "entailment", "nlvr"])
def test_fine_tuning_in_one_process(golden: Path, name: str):
    case = GoldenCase(golden, name)
    task = case.build().to(DEVICE)
    optimizer = build_optimizer(task, RECORDED_OPTIMIZER)
    assert case.steps == 2
    for step in range(case.steps):
        task.start_step(case.alpha(step))
        losses = task(case.batch(step).to(DEVICE))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        check_losses({k: v.item() for k, v in losses.items()}, case.losses(step))
        optimizer.step()
        task.finish_step()
    with torch.no_grad():
        CHECK_TRAINED[name](case, task.eval())
    if any(key.startswith("final/") for key in case.arrays):
        check_final(case, to_reference(task.model, task.teacher, getattr(task, "queue", None)))


def check_labels(case: GoldenCase, task: torch.nn.Module) -> None:
    batch = case.batch(0).to(DEVICE)
    logits = task.model.classify(batch.images, batch.text).cpu()
    torch.testing.assert_close(logits, case.tensor("logits"), atol=WEIGHT, rtol=WEIGHT)


def check_features(case: GoldenCase, task: torch.nn.Module) -> None:
    text = PackedText.from_padded(case.tensor("eval/input_ids"), case.tensor("eval/attention_mask")).to(DEVICE)
    image_embeds, image_feat = task.model.encode_image(case.tensor("eval/image").to(DEVICE))
    text_embeds, text_feat = task.model.encode_text(text)
    own = torch.arange(text.num_texts, device=DEVICE)
    scores = task.model.match(text_embeds, text, own, image_embeds, own)[:, 1]
    for name, found in (("image_feat", image_feat), ("text_feat", text_feat), ("itm_score", scores)):
        torch.testing.assert_close(found.cpu(), case.tensor(f"eval/{name}"), atol=WEIGHT, rtol=WEIGHT)


def check_ranking(case: GoldenCase, task: torch.nn.Module) -> None:
    batch = case.batch(0).to(DEVICE)
    candidates = PackedText.from_padded(case.tensor("candidate_ids"), case.tensor("candidate_mask")).to(DEVICE)
    top_ids, top_probs = case.tensor("top_ids"), case.tensor("top_probs")
    ranked = rank_answers(task.model, task.model.read(batch.images, batch.text), candidates, k=top_ids.shape[1])
    assert torch.equal(ranked.indices.cpu(), top_ids)
    torch.testing.assert_close(ranked.probabilities.cpu(), top_probs, atol=WEIGHT, rtol=WEIGHT)


CHECK_TRAINED = {"retrieval": check_features, "vqa": check_ranking, "entailment": check_labels, "nlvr": check_labels}


def check_gradients(case: GoldenCase, task: torch.nn.Module) -> None:
    gradients = {name: p.grad.cpu() for name, p in task.model.named_parameters()}
    recorded = {k.removeprefix("grad/"): torch.from_numpy(v) for k, v in case.arrays.items() if k.startswith("grad/")}
    assert recorded, "the case holds no gradients"
    for name, value in recorded.items():
        error = (gradients[name].reshape(value.shape) - value).norm() / value.norm()
        assert error < GRADIENT, f"{name}: {error:.1e}"


def test_pretrain_ddp2_under_zero2(golden: Path):
    case = GoldenCase(golden, "pretrain_ddp2")
    ranks = run_ranks(2, train_with_and_without_overlap, case)
    for overlap_comm in (False, True):
        final = []
        for rank, results in enumerate(ranks):
            losses, state = results[overlap_comm]
            for step, found in enumerate(losses):
                check_losses(found, case.losses(step, rank))
            final.append(state)
        check_final(case, final[0])
        for name, value in final[0].items():  # every rank holds the same weights, teacher and queues
            assert torch.equal(value, final[1][name]), name


def train_with_and_without_overlap(case: GoldenCase) -> dict[bool, tuple]:
    return {overlap_comm: train_under_zero2(case, overlap_comm) for overlap_comm in (False, True)}


def train_under_zero2(case: GoldenCase, overlap_comm: bool) -> tuple[list[dict], dict[str, torch.Tensor]]:
    from albef_ds.training.engine import build_engine, clamp_temperature, engine_config, init_distributed

    rank, world_size, _ = init_distributed()
    batch = len(case.batch(0, rank))
    plan = BatchPlan(global_batch=batch * world_size, micro_batch=batch, accumulation=1, world_size=world_size)
    zero = {"stage": 2, "overlap_comm": overlap_comm, "contiguous_gradients": True}
    engine = build_engine(case.build(), RECORDED_OPTIMIZER, engine_config({"zero_optimization": zero}, plan, clip=0.0))
    task = engine.module
    losses = []
    for step in range(case.steps):
        task.start_step(case.alpha(step))
        found = engine(case.batch(step, rank))
        engine.backward(sum(found.values()))
        engine.step()
        task.finish_step(engine.was_step_applied())
        clamp_temperature(engine)
        losses.append({k: v.item() for k, v in found.items()})
    return losses, to_reference(task.model, task.teacher, task.queue)
