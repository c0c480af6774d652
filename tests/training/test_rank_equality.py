"""The same global batch of eight on one, two and four real ranks under ZeRO-2, in fp32 and without dropout.

What must be equal, and is compared within rounding: the losses' mean, the gradients that reach the optimiser, weights,
temperature, teacher, both queues and their pointer, after every step or after several. Two ways to divide a batch:

- Micro-batches of two, of which a rank accumulates four, two, or has one. Each loss looks at a micro-batch alone (ITC:
  its pairs against its own teacher features and the queue; ITM: negatives out of it; MLM: the mean over its labelled
  words), and the queues move after the step. So everything is equal.
- One micro-batch a rank, of eight, four or two, with negatives from all ranks and as many labelled words everywhere. So
  ITM and MLM are equal, and what they train.

What is not equal, as in the reference:

- ITC of larger micro-batches: a pair's candidates are its own rank's features and the queue, not those gathered, and so
  fewer on more ranks. The second way trains without it.
- ITM with negatives of the own rank, for the same reason, and whatever is drawn at random: here the likeliest is taken.
- MLM where ranks have different numbers of labelled words: their means are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from albef_ds.config import BatchPlan, OptimizerConfig, OptionsConfig
from albef_ds.data.batch import MaskedTokens, PackedText, PretrainingBatch
from albef_ds.data.order import SampleOrder
from albef_ds.tasks.pretraining import Pretraining
from tests.golden_cases import most_likely_negative
from tests.ranks import run_ranks
from tests.tiny import CLS, MASK, VOCABULARY, tiny_model

WORLDS, BATCH, MICRO, STEPS = (1, 2, 4), 8, 2, 4
# A larger eps than usual: AdamW turns the sign of a gradient near zero, which is rounding, into a whole step.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3)


@dataclass(frozen=True)
class Case:
    queue_size: int
    micro_batch: int | None = MICRO  # None: the rank's whole share of the batch
    negatives: str = "rank"
    itc: float = 1.0  # its weight in what is trained
    clip: float = 0.0

    def parts(self, step: int, rank: int, world: int) -> list[list[int]]:
        """The samples of this rank's micro-batches."""
        micro = self.micro_batch or BATCH // world
        accumulation = BATCH // (micro * world)
        order = SampleOrder(BATCH * STEPS, micro, accumulation=accumulation, rank=rank, world_size=world)
        return order.step_indices(step).tolist()


CASES = {
    "micro-batches": Case(queue_size=24),
    "micro-batches, a queue of no multiple": Case(queue_size=19, clip=0.5),
    "one micro-batch a rank": Case(queue_size=19, micro_batch=None, negatives="all", itc=0.0),
}


# -- on the ranks ------------------------------------------------------------------------------------------------------


def sample(index: int, labelled: int) -> tuple[Tensor, list[int], list[int]]:
    """An image [3, 32, 32], its text's ids, and which of them are to be guessed; of the index alone."""
    generator = torch.Generator().manual_seed(index)
    length = 4 + index % 5
    ids = [CLS, *torch.randint(5, VOCABULARY, (length - 1,), generator=generator).tolist()]
    return torch.randn(3, 32, 32, generator=generator), ids, [1 + (index + i) % (length - 1) for i in range(labelled)]


def batch_of(indices: list[int], as_many_labels: bool) -> PretrainingBatch:
    samples = [sample(i, 2 if as_many_labels else 1 + i % 3) for i in indices]
    text = PackedText.from_lists([ids for _, ids, _ in samples])
    starts = text.cu_seqlens.tolist()
    positions = torch.tensor(
        [start + p for start, (_, _, at) in zip(starts, samples, strict=False) for p in sorted(at)]
    )
    masked = MaskedTokens.of(text, text.input_ids.index_fill(0, positions, MASK), positions)
    return PretrainingBatch(torch.stack([image for image, _, _ in samples]), text, masked)


def build(case: Case) -> Pretraining:
    torch.manual_seed(0)
    config = tiny_model(queue_size=case.queue_size, momentum=0.9, options=OptionsConfig(negatives=case.negatives))
    task = Pretraining(config, sample_negatives=most_likely_negative)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # untrained, the losses hardly depend on their input
        task.teacher.copy_from(task.model)
    return task


def watch_gradients(engine) -> list[dict[int, Tensor]]:
    """Will hold, of every step, this rank's slice of each group's gradient as the optimiser gets it."""
    zero, steps = engine.optimizer, []

    def note(*_) -> None:  # DeepSpeed steps one group after the other
        if not steps or len(steps[-1]) == len(zero.single_partition_of_fp32_groups):
            steps.append({})
        for group, master in enumerate(zero.single_partition_of_fp32_groups):
            if master.grad is not None and group not in steps[-1]:
                steps[-1][group] = master.grad.detach().clone()
                return

    zero.optimizer.register_step_pre_hook(note)
    return steps


def train(case: Case) -> dict:
    from albef_ds.training.engine import build_engine, clamp_temperature, engine_config

    rank, world = dist.get_rank(), dist.get_world_size()
    accumulation = len(case.parts(0, rank, world))
    plan = BatchPlan(
        global_batch=BATCH, micro_batch=BATCH // (world * accumulation), accumulation=accumulation, world_size=world
    )
    zero = {"stage": 2, "contiguous_gradients": True, "overlap_comm": True}
    engine = build_engine(build(case), OPTIMIZER, engine_config({"zero_optimization": zero}, plan, case.clip))
    task, gradients, losses = engine.module, watch_gradients(engine), []
    names = {id(p): name for name, p in task.named_parameters()}
    for step in range(STEPS):
        task.start_step(alpha=0.4)
        losses.append({"itc": 0.0, "itm": 0.0, "mlm": 0.0})
        for part in case.parts(step, rank, world):
            found = engine(batch_of(part, as_many_labels=case.micro_batch is None))
            engine.backward(case.itc * found["itc"] + found["itm"] + found["mlm"])
            engine.step()
            for name, loss in found.items():
                losses[-1][name] += loss.item() / accumulation
        task.finish_step(engine.was_step_applied())
        clamp_temperature(engine)
    return {
        "losses": losses,
        "gradients": gradients,
        "layout": [[(names[id(p)], p.shape) for p in group] for group in engine.optimizer.bit16_groups],
        "state": {name: value.clone() for name, value in task.state_dict().items()},
    }


def train_all_cases() -> dict[str, dict]:
    from albef_ds.training.engine import init_distributed

    init_distributed()
    return {name: train(case) for name, case in CASES.items()}


# -- compared ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict]]:
    """By number of ranks; every process, which takes long to start, goes through all cases."""
    return {world: run_ranks(world, train_all_cases) for world in WORLDS}


def whole_gradients(ranks: list[dict], step: int) -> dict[str, Tensor]:
    """By parameter, put together from the slices of all ranks."""
    found = {}
    for group, layout in enumerate(ranks[0]["layout"]):
        flat = torch.cat([rank["gradients"][step][group] for rank in ranks])
        for name, shape in layout:
            found[name], flat = flat[: shape.numel()].view(shape), flat[shape.numel() :]
    return found


def mean_losses(ranks: list[dict], step: int) -> dict[str, float]:
    return {name: sum(rank["losses"][step][name] for rank in ranks) / len(ranks) for name in ranks[0]["losses"][step]}


def of_case(runs: dict, case: str, world: int) -> list[dict]:
    return [rank[case] for rank in runs[world]]


MORE = pytest.mark.parametrize("world", WORLDS[1:])
EACH = pytest.mark.parametrize("case", CASES)


@MORE
@EACH
def test_losses_are_those_of_one_rank(runs, case, world):
    for step in range(STEPS):
        expected, found = (mean_losses(of_case(runs, case, w), step) for w in (1, world))
        compared = ("itc", "itm", "mlm") if CASES[case].itc else ("itm", "mlm")
        for name in compared:
            assert found[name] == pytest.approx(expected[name], rel=5e-6), (name, step)


@MORE
@EACH
def test_the_gradients_that_reach_the_optimiser_are_those_of_one_rank(runs, case, world):
    for step in range(STEPS):
        expected, found = (whole_gradients(of_case(runs, case, w), step) for w in (1, world))
        assert found.keys() == expected.keys()
        assert (expected["model.temp"] != 0) == (CASES[case].itc > 0)
        largest = max(gradient.norm() for gradient in expected.values())
        assert largest > 0.1
        for name, gradient in expected.items():
            # fp32 sums in another order, and what they made of the steps before
            error = (found[name] - gradient).norm()
            assert error <= 2e-5 * gradient.norm() + 1e-6 * largest, f"{name} in step {step}: off by {error:.1e}"


@MORE
@EACH
def test_weights_temperature_and_teacher_are_those_of_one_rank(runs, case, world):
    (one, *_), ranks = (of_case(runs, case, w) for w in (1, world))
    initial = build(CASES[case]).state_dict()
    names = [name for name in one["state"] if not name.startswith("queue.")]
    assert {"model.temp", "teacher.vision_proj.weight", "teacher_due"} <= set(names)
    for name in names:
        for rank in ranks:
            torch.testing.assert_close(
                rank["state"][name], one["state"][name], atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    for part in ("model.", "teacher."):
        assert max((one["state"][n] - initial[n]).abs().max() for n in names if n.startswith(part)) > 1e-3, part


@MORE
@EACH
def test_queues_and_pointer_are_those_of_one_rank(runs, case, world):
    (one, *_), ranks = (of_case(runs, case, w) for w in (1, world))
    length = CASES[case].queue_size
    assert STEPS * BATCH > length, "the queue must have wrapped"
    for rank in ranks:
        state = rank["state"]
        assert state["queue.pointer"].tolist() == one["state"]["queue.pointer"].tolist() == [STEPS * BATCH % length]
        for name in ("queue.image", "queue.text"):
            torch.testing.assert_close(state[name], one["state"][name], atol=2e-5, rtol=0)
            assert torch.equal(state[name], ranks[0]["state"][name]), "ranks differ"


@MORE
def test_itc_of_one_micro_batch_a_rank_is_that_of_its_own_pairs_and_the_queue(runs, world):
    """At the first step, where all have the same weights: what one process gets for each rank's share by itself."""
    name = "one micro-batch a rank"
    alone = build(CASES[name])
    for rank, found in enumerate(of_case(runs, name, world)):
        alone.start_step(alpha=0.4)
        (part,) = CASES[name].parts(0, rank, world)
        assert found["losses"][0]["itc"] == pytest.approx(alone(batch_of(part, True))["itc"].item(), rel=5e-6)


def test_what_differs_by_design_differs():
    """Fewer candidates make ITC smaller (with hard targets, for every pair), and other negatives another ITM."""
    task = build(CASES["micro-batches"])
    found = {}
    for world in WORLDS:
        task.start_step(alpha=0.0)
        shares = [Case(24, micro_batch=None).parts(0, rank, world)[0] for rank in range(world)]
        losses = [task(batch_of(share, True)) for share in shares]
        found[world] = {name: sum(loss[name].item() for loss in losses) / world for name in losses[0]}
    assert found[1]["itc"] - 1e-3 > found[2]["itc"] > found[4]["itc"] + 1e-3
    assert abs(found[1]["itm"] - found[4]["itm"]) > 1e-3
    assert found[1]["mlm"] == pytest.approx(found[4]["mlm"], rel=1e-5)
