"""DeepSpeed's steps on GPUs that are not there, as ranks 0 and 3 of eight: tests/rehearsal/deepspeed_steps.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from benchmarks.fake_ranks import ROOT
from tests.rehearsal.deepspeed_cases import CASES, LEARNING_RATES, MICRO, WORLD

RANKS = (0, 3)
STEPS = [f"step {number}" for number in range(1, len(LEARNING_RATES) + 1)]
FP32 = 4  # bytes
CONTRASTIVE = ("pretraining", "retrieval")  # the tasks with features, queues and a temperature

# What breaks, and what must be said of it.
FAULTS = {
    "Curious": "HostRead: tests/rehearsal/deepspeed_faults.py:forward, line .*: the host reads a value",
    "Copying": "HostRead: tests/rehearsal/deepspeed_faults.py:step, line .*: a copy from the GPU",
    "Crosswise": "ValueError: allreduce_: NCCL takes contiguous tensors alone",
    "LeftBehind": "RuntimeError: .* two different devices cpu, cuda",
    "Misspelt": "DeepSpeedConfigError: .*'zero_optimization.reduce_bucket_siz'.* did you mean 'reduce_bucket_size'",
    "Rounded": "AssertionError: not kept in fp32: model.itm_head.weight",
    "Pointlike": "RuntimeError: self.dim.. cannot be 0",
    "Coarse": "AssertionError: the loss itm is bfloat16",
    "Hasty": "Race: aten.div_.Tensor on stream side does not wait for stream main",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, int], dict]:
    """By case and rank. The processes of both ranks run side by side, as ranks do."""
    folder = tmp_path_factory.mktemp("rows")
    processes = {rank: start(rank, folder) for rank in RANKS}
    found = {}
    try:
        for rank, process in processes.items():
            status = process.wait(timeout=500)
            assert status == 0, f"rank {rank} ended with {status}:\n{(folder / f'{rank}.err').read_text()[-3000:]}"
            for line in (folder / f"{rank}.jsonl").read_text().splitlines():
                row = json.loads(line)
                found[row["case"], rank] = row
    finally:
        for process in processes.values():
            process.kill()
    return found


def start(rank: int, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "tests.rehearsal.deepspeed_steps", "--faults", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{rank}.jsonl", "w") as out, open(folder / f"{rank}.err", "w") as err:
        return subprocess.Popen([*command, "--rank", str(rank)], cwd=ROOT, env=environment, stdout=out, stderr=err)


def first_difference(mine: dict, theirs: dict) -> str | None:
    """Where two ranks part: the first collective that they do not ask for alike. NCCL would hang there."""
    for phase in ("start", *STEPS):
        for place, (a, b) in enumerate(zip_longest(mine["collectives"][phase], theirs["collectives"][phase])):
            if a != b:
                return f"{phase}, collective {place}: {a} on one rank, {b} on the other"
    return None


def gradient_sums(row: dict, step: str) -> list[dict]:
    """The all-reduces of whole buckets; the others are single numbers, or Muon's, which come later."""
    case = CASES[row["case"]]
    stream = "side" if case.overlap else "main"
    asked = row["collectives"][step]
    return [c for c in asked if c["kind"] == "allreduce_" and c["stream"] == stream and c["bytes"] > FP32]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_both_steps_come_to_their_end(rows, name: str, rank: int):
    assert rows[name, rank]["error"] is None
    assert rows[name, rank]["on"] == "fake cuda"


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_ask_for_the_same_in_the_same_order(rows, name: str):
    assert first_difference(*(rows[name, rank] for rank in RANKS)) is None


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_summed_over_the_ranks_in_fp32_and_once(rows, name: str):
    row, case = rows[name, 0], CASES[name]
    for step in STEPS:
        sums = gradient_sums(row, step)
        assert {c["dtype"] for c in sums} == {"torch.float32"}
        assert sum(c["bytes"] for c in sums) == FP32 * row["trained"] * case.accumulation
        # What the configurations' bucket sizes are for: the first is sent while the rest is still computed.
        assert len(sums) >= 2 * case.accumulation


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.negatives == "rank"])
def test_a_rank_sends_its_share_of_the_parameters_and_its_features_and_nothing_else(rows, name: str):
    row, case = rows[name, 0], CASES[name]
    features = 2 * MICRO * case.accumulation * case.model.embed_dim * FP32 if case.task in CONTRASTIVE else 0
    ids = 8 * MICRO if case.task == "retrieval" else 0
    for step in STEPS:
        sent = sum(c["bytes"] for c in row["collectives"][step] if c["kind"] == "_allgather_base_")
        # ZeRO pads each of at most three groups to two elements a rank.
        assert 0 <= sent - features - ids - FP32 * row["trained"] / WORLD < 3 * 2 * FP32


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_summed_beside_the_backward_pass_where_it_is_asked_for(rows, name: str):
    asked = [c for step in STEPS for c in rows[name, 0]["collectives"][step]]
    assert any(c["stream"] == "side" for c in asked) == CASES[name].overlap


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_the_temperature_is_clamped_where_zero_keeps_it(rows, name: str, rank: int):
    """It is the first parameter of its group, so the masters of rank 0 have it."""
    places = ["masters", "model"] if rank == 0 else ["model"]
    assert rows[name, rank]["clamped"] == (places if CASES[name].task in CONTRASTIVE else [])


# With offload DeepSpeed looks at every gradient.
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.deepspeed != "zero2_offload"])
def test_the_host_waits_for_the_gradients_norm_alone(rows, name: str):
    assert rows[name, 0]["reads"].keys() == {"deepspeed/runtime/utils.py:is_invalid_grad_norm"}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(rows, name: str, rank: int):
    assert re.match(FAULTS[name], rows[name, rank]["error"])


def test_a_collective_of_one_rank_alone_is_seen(rows):
    alone = [rows["Lonely", rank] for rank in RANKS]
    assert [row["error"] for row in alone] == [None, None]
    assert first_difference(*alone).startswith("step 1, collective 0: {'kind': 'allreduce_', 'bytes': 4")
