"""The options that change the mathematics: what each does, and that all are off unless asked for."""

from __future__ import annotations

import math
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from albef_ds.config import ConfigError, ModelConfig, OptionsConfig, load_config
from albef_ds.data.batch import MaskedTokens, PackedText, PairBatch, PretrainingBatch
from albef_ds.data.mixgen import mixgen
from albef_ds.kernels import sample_hard_negatives
from albef_ds.model.vision import PatchDrop, build_vision_encoder
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.tasks.retrieval import Retrieval
from albef_ds.training.flops import FlopCount
from tests.golden_cases import most_likely_negative
from tests.ranks import run_ranks
from tests.tiny import tiny_batch, tiny_model

TASKS = {"pretraining": Pretraining, "retrieval": Retrieval}
# Uneven over two ranks of three: the first draws a text longer than its own. One text is [CLS] alone.
LENGTHS = [2, 1, 2, 3, 7, 9]
IDS = torch.tensor([4, 8, 4, 5, 8, 6])


def build(kind=Pretraining, sample_negatives=most_likely_negative, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return kind(tiny_model(options=OptionsConfig(**options)), sample_negatives=sample_negatives).to(dtype)


def batch_of(task: str, rows: slice = slice(None), ids: torch.Tensor = IDS, dtype=torch.float64):
    """Rows of the batch of six, as a batch."""
    whole = tiny_batch(6, seed=3, lengths=LENGTHS, labelled=0.6)
    starts = whole.text.cu_seqlens[:-1].tolist()
    chosen = list(range(6))[rows]
    tokens = torch.cat([torch.arange(starts[i], starts[i] + LENGTHS[i]) for i in chosen])
    text = PackedText.from_lists([whole.text.input_ids[starts[i] : starts[i] + LENGTHS[i]].tolist() for i in chosen])
    images = whole.images[rows].to(dtype)
    if task == "retrieval":
        return PairBatch(images, text, ids[rows])
    labelled = torch.isin(tokens, whole.masked.positions).nonzero().flatten()
    masked = MaskedTokens.of(text, whole.masked.input_ids[tokens], labelled)
    return PretrainingBatch(images, text, masked)


def itm_and_gradients(task, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    task.start_step(0.4)
    itm = task(batch)["itm"]
    itm.backward()
    gradients = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    return itm.detach(), gradients


def logits_of(task) -> list[torch.Tensor]:
    """Will hold what the matching head says, [3 B, 2] a forward pass."""
    seen: list[torch.Tensor] = []
    task.model.itm_head.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    return seen


# -- negatives: all ----------------------------------------------------------------------------------------------------


def matching_on_a_rank(rank: int, kind: str, negatives: str, checkpointing: bool = False, reserve: bool = False):
    """ITM and its gradients, averaged over the ranks as DeepSpeed does; this rank's logits [9, 2]; collectives."""
    task = build(TASKS[kind], dtype=torch.float64, negatives=negatives)
    if checkpointing:
        task.model.enable_checkpointing()
    if reserve:  # rows for the longest texts, as on a GPU, which is not asked how long they are
        task.room = lambda tokens, image_embeds: tokens
    seen, own = logits_of(task), slice(3 * rank, 3 * rank + 3)
    with mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gathers:
        itm, gradients = itm_and_gradients(task, batch_of(kind, own))
    for tensor in (itm, *gradients.values()):
        dist.all_reduce(tensor)
        tensor /= 2
    return itm, gradients, seen[0], gathers.call_count


def sampled_on_a_rank(rank: int, ids: list[int]):
    """Bf16 arithmetic and the real sampler: what this rank drew [2, 3], ITM, and whether all gradients are finite."""
    task, drawn = build(Retrieval, negatives="all"), []

    def sample(logits, ids):
        drawn.append(sample_hard_negatives(logits, ids))
        return drawn[-1]

    task.sample_negatives, own = sample, slice(3 * rank, 3 * rank + 3)
    task.start_step(0.4)
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(batch_of("retrieval", own, torch.tensor(ids), torch.float32))
    sum(losses.values()).backward()
    finite = all(p.grad.isfinite().all() for p in task.model.parameters() if p.grad is not None)
    return [d[own].tolist() for d in drawn], losses["itm"].item(), finite


MATCHING = {
    "pretraining": ("pretraining", "all"),
    "pretraining, checkpointed": ("pretraining", "all", True),
    "pretraining, rows reserved": ("pretraining", "all", False, True),
    "retrieval": ("retrieval", "all"),
    "retrieval, rows reserved": ("retrieval", "all", False, True),
}
SAMPLED = {"one stranger": [1, 1, 1, 1, 1, 2], "no stranger": [1, 1, 1, 1, 1, 1]}


def everything_on_a_rank(folder: str) -> dict:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=int(os.environ["RANK"]), world_size=2)
    rank = dist.get_rank()
    found = {name: matching_on_a_rank(rank, *case) for name, case in MATCHING.items()}
    found |= {name: sampled_on_a_rank(rank, ids) for name, ids in SAMPLED.items()}
    return found | {"off": matching_on_a_rank(rank, "pretraining", "rank")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """All cases in two processes, which take long to start."""
    return run_ranks(2, everything_on_a_rank, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("case", MATCHING)
def test_negatives_of_all_ranks_are_those_of_one_process_with_the_whole_batch(ranks, case):
    """Two ranks of three samples and one process of six: the same pairs, the same logits, the same gradients."""
    kind = MATCHING[case][0]
    whole = build(TASKS[kind], dtype=torch.float64, negatives="all")
    seen = logits_of(whole)
    wanted_itm, wanted = itm_and_gradients(whole, batch_of(kind))

    # The logits of a rank are those of its positives, its hard texts, its hard images.
    found = torch.stack([rank[case][2].unflatten(0, (3, 3)) for rank in ranks], dim=1).flatten(0, 2)
    torch.testing.assert_close(found, seen[0], atol=1e-10, rtol=1e-10)
    for rank in ranks:
        itm, gradients = rank[case][:2]
        torch.testing.assert_close(itm, wanted_itm, atol=1e-10, rtol=1e-10)
        assert gradients.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(gradients[name], wanted[name], atol=1e-10, rtol=1e-8, msg=f"{name} differs")


def test_the_ranks_own_negatives_are_others_and_ask_nobody(ranks):
    """Also shows that what the test above compares notices where negatives come from."""
    wanted_itm, _ = itm_and_gradients(build(dtype=torch.float64), batch_of("pretraining"))
    assert (ranks[0]["off"][0] - wanted_itm).abs() > 1e-6
    assert ranks[0]["off"][3] == 0
    assert ranks[0]["pretraining"][3] == 4  # lengths, the teacher's features, texts, images


@pytest.mark.parametrize("case", SAMPLED)
def test_a_sample_of_the_same_id_on_another_rank_is_no_negative(ranks, case):
    ids = SAMPLED[case]
    for direction in range(2):
        drawn = [index for rank in ranks for index in rank[case][0][direction]]
        for mine, index in enumerate(drawn):
            others = [j for j in range(6) if ids[j] != ids[mine]]
            assert index in others if others else index == -1
    assert all(math.isfinite(rank[case][1]) and rank[case][2] for rank in ranks)


# -- mixgen ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASKS)
def test_mixed_training_learns_from_the_mixed_batch_and_evaluation_from_none(kind):
    batch = batch_of(kind, dtype=torch.float32)
    plain, mixing = build(TASKS[kind]), build(TASKS[kind], mixgen=0.34)
    for task in (plain, mixing):
        task.start_step(0.4)
    mixed, given, wanted = mixing(batch), plain(batch), plain(mixgen(batch, 0.34))
    assert mixed == wanted
    assert mixed["itm"] != given["itm"]
    assert mixing.eval()(batch)["itm"] == plain.eval()(batch)["itm"]


# -- token_drop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "kept"), [(0.5, 8), (0.3, 11), (0.99, 1), (0.01, 16)])
def test_an_encoder_that_drops_patches_does_no_work_for_them(share, kept):
    """Of 16 patches; [CLS] stays."""
    config = tiny_model().vision
    encoder, images = build_vision_encoder(config, token_drop=share), torch.randn(3, 3, 32, 32)
    with FlopCount() as flops:
        out = encoder.forward_features(images)
    assert out.shape == (3, 1 + kept, 24)
    assert out.isfinite().all()
    rows, width = 3 * (1 + kept), config.width
    embedding = 2 * 3 * 16 * (3 * 8 * 8) * width
    layer = 2 * rows * 12 * width**2 + 4 * rows * (1 + kept) * width  # four matrix products, and attention
    assert flops.total == embedding + config.layers * layer


def test_the_patches_that_stay_keep_their_position_and_differ_from_image_to_image():
    encoder = build_vision_encoder(tiny_model().vision, token_drop=0.5)
    tokens = torch.arange(17.0)[None, :, None].expand(40, 17, 24)  # each row says where it stands
    torch.manual_seed(0)
    kept = encoder.patch_drop(tokens)[:, :, 0].long()
    assert (kept[:, 0] == 0).all(), "[CLS] comes first"
    assert all(len(set(row)) == 9 for row in kept.tolist())
    assert len({tuple(sorted(row)) for row in kept.tolist()}) > 30
    assert set(kept[:, 1:].flatten().tolist()) == set(range(1, 17)), "every patch may stay"


def test_teacher_and_evaluation_see_all_patches():
    task = build(token_drop=0.5)
    images = torch.randn(2, 3, 32, 32)
    assert task.model.encode_image(images)[0].shape == (2, 9, 24)
    with torch.no_grad():
        assert task.teacher.encode_image(images)[0].shape == (2, 17, 24)
    assert task.eval().model.encode_image(images)[0].shape == (2, 17, 24)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_dropped_patches_gives_every_parameter_a_gradient(checkpointing):
    task = build(token_drop=0.5, mixgen=0.25)
    if checkpointing:
        task.model.enable_checkpointing()
    task.start_step(0.4)
    sum(task(tiny_batch(6, lengths=LENGTHS, labelled=0.5)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())


# -- off, and asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASKS)
def test_without_options_no_random_number_is_drawn(kind):
    task, batch = build(TASKS[kind]), batch_of(kind, dtype=torch.float32)
    assert task.config.options == ModelConfig().options == OptionsConfig(mixgen=0, negatives="rank", token_drop=0)
    before = torch.get_rng_state()
    task.start_step(0.4)
    task(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(isinstance(module, PatchDrop) for module in task.modules())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.options.mixgen=0.25", "data.max_tokens=33"], "joins two texts .* into 65, .*max_positions = 64"),
        (["model.options.mixgen=0.6"], "model.options.mixgen: .* less than or equal to 0.5"),
        (["model.options.token_drop=1"], "model.options.token_drop: .* less than 1"),
        (["model.options.negatives=global"], "model.options.negatives: .*'rank' or 'all'"),
        (["model.options.token_drop=0.5", "task=vqa"], "model.options.token_drop: for pretraining.*the task is vqa"),
        (["model.options.mix_gen=0.1"], "did you mean 'model.options.mixgen'"),
    ],
)
def test_options_that_cannot_work_are_refused_at_the_start(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("demo", overrides)


def test_options_that_fit_are_taken():
    options = ["mixgen=0.25", "negatives=all", "token_drop=0.5"]
    config = load_config("demo", [f"model.options.{o}" for o in options] + ["data.max_tokens=32"])
    assert config.model.options == OptionsConfig(mixgen=0.25, negatives="all", token_drop=0.5)
