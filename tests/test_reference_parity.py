"""Our step against numbers recorded from the public reference, in fp32 on the CPU.

tests/golden and tests/golden_other hold them at two sizes (their READMEs). Other recordings of the same layout:

pytest tests/test_reference_parity.py --golden DIR      # any sizes; cases that DIR lacks are skipped
"""

from __future__ import annotations

import pytest
import torch

from albef_ds.config import BatchPlan, OptimizerConfig
from albef_ds.data.batch import PackedText
from albef_ds.evaluation.answers import rank_answers
from albef_ds.evaluation.heatmaps import itc_heatmaps, itm_heatmaps
from albef_ds.model.reference_weights import to_reference
from albef_ds.training.optimizer import build_optimizer
from tests.golden_cases import FINE_TUNED, SHIPPED, GoldenCase, packed
from tests.ranks import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECORDED_OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.02, betas=(0.9, 0.999), eps=1e-8)

# fp32 sums in another order: losses to 2e-5 relative, gradients to 1e-4 of their norm, heat maps to 1e-4 of their
# largest value. AdamW turns the sign of a tiny gradient into a whole step, 1e-3, so weights get 2e-4 absolute.
LOSS, GRADIENT, HEAT, WEIGHT = 2e-5, 1e-4, 1e-4, 2e-4

# The cases that a test's argument of this name goes through.
ARGUMENTS = {name: (name,) for name in ("pretrain", "pretrain_ddp2", "grounding", "text_assignment")}
ARGUMENTS["fine_tuned"] = FINE_TUNED
# The reference saves these with every model; nothing trains them there and ours does not have them.
IDLE = {"text_assignment": {"temp"}}


def pytest_generate_tests(metafunc) -> None:
    for argument in ARGUMENTS.keys() & set(metafunc.fixturenames):
        cases = recorded_cases(ARGUMENTS[argument], metafunc.config.getoption("--golden"))
        metafunc.parametrize(argument, cases, ids=str)


def recorded_cases(names, folder) -> list:
    if folder is None:
        return [GoldenCase(shipped, name) for shipped, held in SHIPPED.items() for name in names if name in held]
    cases = [GoldenCase(folder, name) for name in names]
    absent = "{case.folder} holds no {case.name}.npz and {case.name}.pth"
    return [
        case if case.is_recorded else pytest.param(case, marks=pytest.mark.skip(absent.format(case=case)))
        for case in cases
    ]


def check_losses(found: dict[str, float], recorded: dict[str, float]) -> None:
    assert found.keys() == recorded.keys()
    for name, value in recorded.items():
        assert found[name] == pytest.approx(value, rel=LOSS), name


def check_final(case: GoldenCase, found: dict[str, torch.Tensor]) -> None:
    recorded = {k.removeprefix("final/"): torch.from_numpy(v) for k, v in case.arrays.items() if k.startswith("final/")}
    for name in recorded.keys() - IDLE.get(case.task, set()):
        value = recorded[name]
        torch.testing.assert_close(found[name], value, atol=WEIGHT, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def train(case: GoldenCase, task: torch.nn.Module, before=lambda step: None, after_backward=lambda step: None) -> None:
    """All recorded steps, each with its losses compared."""
    optimizer = build_optimizer(task, RECORDED_OPTIMIZER)
    assert case.steps >= 2
    for step in range(case.steps):
        before(step)
        task.start_step(case.alpha(step))
        task.clamp_temperature()
        losses = task(case.batch(step).to(DEVICE))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        check_losses({k: v.item() for k, v in losses.items()}, case.losses(step))
        after_backward(step)
        optimizer.step()
        task.finish_step()
    check_final(case, to_reference(task.model, task.teacher, getattr(task, "queue", None)))


@pytest.mark.parametrize("impl", ["torch", "triton"])  # Triton in its interpreter where there is no GPU
def test_pretrain_in_one_process(pretrain: GoldenCase, impl: str):
    assert any(key.startswith("final/") for key in pretrain.arrays), "the case holds no final weights"
    task = pretrain.build(impl).to(DEVICE)
    train(pretrain, task, after_backward=lambda step: check_gradients(pretrain, task) if step == 0 else None)


def check_gradients(case: GoldenCase, task: torch.nn.Module) -> None:
    gradients = {name: p.grad.cpu() for name, p in task.model.named_parameters()}
    recorded = {k.removeprefix("grad/"): torch.from_numpy(v) for k, v in case.arrays.items() if k.startswith("grad/")}
    assert recorded, "the case holds no gradients"
    for name, value in recorded.items():
        error = (gradients[name].reshape(value.shape) - value).norm() / value.norm()
        assert error < GRADIENT, f"{name}: {error:.1e}"


def test_fine_tuning_in_one_process(fine_tuned: GoldenCase):
    task = fine_tuned.build().to(DEVICE)
    train(fine_tuned, task)
    with torch.no_grad():
        CHECK_TRAINED[fine_tuned.task](fine_tuned, task.eval())


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
    question = task.model.read(batch.images, batch.text)
    recorded = [key for key in case.arrays if key.startswith("top_ids")]  # of k = 4, and in newer cases of 1 and of all
    for key in recorded:
        top_ids, top_probs = case.tensor(key), case.tensor(key.replace("top_ids", "top_probs"))
        ranked = rank_answers(task.model, question, candidates, k=top_ids.shape[1])
        assert torch.equal(ranked.indices.cpu(), top_ids), key
        torch.testing.assert_close(ranked.probabilities.cpu(), top_probs, atol=WEIGHT, rtol=WEIGHT)


CHECK_TRAINED = {"retrieval": check_features, "vqa": check_ranking, "entailment": check_labels, "nlvr": check_labels}


def test_text_assignment_in_one_process(text_assignment: GoldenCase):
    task = text_assignment.build().to(DEVICE)
    similarities = []

    def as_recorded(step: int) -> None:
        drawn = text_assignment.assignment(step)
        task.assign = lambda found: (similarities.append(found), drawn)[1]

    train(text_assignment, task, before=as_recorded)
    for found in similarities:  # of the images, what the draw goes by: unit features / 0.07
        torch.testing.assert_close(found.diagonal(), torch.full_like(found.diagonal(), 1 / 0.07))


def test_heatmaps_of_matching(grounding: GoldenCase):
    model, images, text = grounded(grounding)
    mask = grounding.tensor("attention_mask").bool()
    lengths, longest = mask.sum(1), mask.shape[1]
    layers = recorded_numbers(grounding, "itm/layer")
    config = model.config.text
    assert layers == list(range(config.fusion_layer, config.layers))
    for layer in layers:
        found = itm_heatmaps(model, images, text, layer)
        check_heat(found.words.cpu(), grounding.tensor(f"itm_words/layer{layer}")[mask], f"layer {layer}, each word")
        # The recorded mean is over all places, padding (which is 0) included; ours is over the text's own tokens.
        texts = found.texts.cpu() * (lengths / longest)[:, None, None]
        check_heat(texts, grounding.tensor(f"itm/layer{layer}"), f"layer {layer}")
        torch.testing.assert_close(found.scores.cpu(), grounding.tensor("itm_score"), atol=WEIGHT, rtol=WEIGHT)


def test_heatmaps_of_contrast(grounding: GoldenCase):
    model, images, text = grounded(grounding)
    blocks = recorded_numbers(grounding, "itc/block")
    assert blocks == list(range(len(model.visual_encoder.blocks)))
    for block in blocks:
        found = itc_heatmaps(model, images, text, block).texts.cpu()
        check_heat(found, grounding.tensor(f"itc/block{block}"), f"block {block}")


def grounded(case: GoldenCase):
    text = packed({key: case.tensor(key) for key in ("input_ids", "attention_mask")})
    return case.build().to(DEVICE).model, case.tensor("image").to(DEVICE), text.to(DEVICE)


def recorded_numbers(case: GoldenCase, prefix: str) -> list[int]:
    return sorted(int(key.removeprefix(prefix)) for key in case.arrays if key.startswith(prefix))


def check_heat(found: torch.Tensor, recorded: torch.Tensor, what: str) -> None:
    assert found.shape == recorded.shape and recorded.max() > 0, what
    error = (found - recorded).abs().max() / recorded.max()
    assert error < HEAT, f"{what}: off by {error:.1e} of the largest value"


def test_pretrain_ddp2_under_zero2(pretrain_ddp2: GoldenCase):
    case = pretrain_ddp2
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
