"""The rival must be the real one: our implementation of the reference's step against its recorded numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from albef_ds.model.weight_files import read_state_dict
from albef_ds.training.optimizer import build_optimizer
from benchmarks.reference import PaddedBatch, ReferenceALBEF
from benchmarks.reference.model import random_masks
from tests.golden_cases import GoldenCase
from tests.ranks import run_ranks
from tests.test_reference_parity import GRADIENT, RECORDED_OPTIMIZER, check_final, check_losses

MODERN = {"modernised": True, "compile_layers": False}


def build(case: GoldenCase, **changes) -> ReferenceALBEF:
    model = ReferenceALBEF(case.model_config(), choose=lambda weights: int(weights.argmax()), **changes)
    model.load_state_dict(read_state_dict(case.folder / f"{case.name}.pth"))  # strict: the same keys, all of them
    return model


def train(case: GoldenCase, model: ReferenceALBEF, call, rank: int | None = None) -> tuple[list[dict], dict, dict]:
    """Losses of every step, gradients of the first, the final state."""
    optimizer, losses, gradients = build_optimizer(model, RECORDED_OPTIMIZER), [], {}
    for step in range(case.steps):
        found = call(PaddedBatch.from_packed(case.batch(step, rank)), case.alpha(step))
        optimizer.zero_grad()
        sum(found.values()).backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        losses.append({name: loss.item() for name, loss in found.items()})
    return losses, gradients, model.state_dict()


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["as it was", "with SDPA"])
def test_recorded_case_in_one_process(golden: Path, changes: dict):
    case = GoldenCase(golden, "pretrain")
    model = build(case, **changes)
    losses, gradients, state = train(case, model, model)
    for step, found in enumerate(losses):
        check_losses(found, case.losses(step))
    recorded = {k.removeprefix("grad/"): torch.from_numpy(v) for k, v in case.arrays.items() if k.startswith("grad/")}
    for name, value in recorded.items():
        assert (gradients[name] - value).norm() / value.norm() < GRADIENT, name
    check_final(case, state)


def test_recorded_case_under_ddp(golden: Path):
    case = GoldenCase(golden, "pretrain_ddp2")
    ranks = run_ranks(2, train_under_ddp, case)
    for rank, (losses, _) in enumerate(ranks):
        for step, found in enumerate(losses):
            check_losses(found, case.losses(step, rank))
    check_final(case, ranks[0][1])


def train_under_ddp(case: GoldenCase) -> tuple[list[dict], dict]:
    torch.distributed.init_process_group("gloo")
    model = build(case)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    losses, _, state = train(case, model, ddp, torch.distributed.get_rank())
    return losses, state


def test_masking_leaves_cls_and_padding_alone(golden: Path):
    torch.manual_seed(0)
    case = GoldenCase(golden, "pretrain")
    batch = PaddedBatch.from_packed(case.batch(0))
    masked = random_masks(batch, case.model_config(), probability=1.0, mask_id=4, cls_id=2)
    predicted = masked.labels != -100
    assert torch.equal(predicted, (batch.attention_mask == 1) & (batch.input_ids != 2))
    assert torch.equal(masked.labels[predicted], batch.input_ids[predicted])
    assert torch.equal(masked.masked_ids[~predicted], batch.input_ids[~predicted])
    none = random_masks(batch, case.model_config(), probability=0.0, mask_id=4, cls_id=2)
    assert torch.equal(none.masked_ids, batch.input_ids) and (none.labels == -100).all()


def test_a_queue_that_the_batch_does_not_divide_is_refused(golden: Path):
    case = GoldenCase(golden, "pretrain")
    model = ReferenceALBEF(case.model_config(queue_size=47))
    batch = PaddedBatch.from_packed(case.batch(0))
    with pytest.raises(ValueError, match="multiple"):
        model(replace(batch), 0.0)
