"""benchmarks.collectives: what ranks ask each other for, counted in other processes, and whether they ask alike."""

from __future__ import annotations

import contextlib
import io
import json
import sys

import pytest

from benchmarks import collectives, workload
from benchmarks.rings import Asked

BATCH, FP32 = 8, 4
TINY = ["--preset", "tiny", "--batch", str(BATCH), "--json"]
GPU = "zero2_a100_80gb, zero2_h100"  # the files say the same
ON_A_GPU = """
from benchmarks import fake_gpu
fake_gpu.install()
from benchmarks import fake_steps
raise SystemExit(fake_steps.main())
"""
# Where there are three, the last rank has a larger batch under ZeRO-1, and under ZeRO-2 it gathers the groups of its
# parameters backwards.
PLANTED = """
import dataclasses, os
from unittest import mock
from benchmarks import fake_steps
step = fake_steps.step

def planted(order, machine):
    from deepspeed.runtime.zero import stage_1_and_2 as zero
    if (order.rank, order.world) != (2, 3):
        return step(order, machine)
    if order.deepspeed["zero_optimization"]["stage"] == 1:
        return step(dataclasses.replace(order, batch=2 * order.batch), machine)
    gather = zero.all_gather_dp_groups
    def backwards(**given):
        parts = ("groups_flat", "partitioned_param_groups", "dp_process_group")
        return gather(**{name: value[::-1] if name in parts else value for name, value in given.items()})
    with mock.patch.object(zero, "all_gather_dp_groups", backwards):
        return step(order, machine)

fake_steps.step = planted
os._exit(fake_steps.main())
"""


def counted(*arguments: str, program: str) -> tuple[int, list[dict], str]:
    """(status, rows, what was said beside them), counted by a program of its own."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(collectives, "WORKER", (sys.executable, "-W", "ignore", "-c", program))
        patch.delenv("DS_ACCELERATOR", raising=False)  # a machine where nobody has told DeepSpeed what to run on
        status = collectives.main([*TINY, *arguments])
    return status, json.loads(out.getvalue())["rows"], err.getvalue()


@pytest.fixture(scope="module")
def run() -> tuple[int, list[dict], str]:
    """Of a GPU's configuration and a CPU's."""
    worlds = ("--world", "1", "3", "8")
    return counted("--deepspeed", "zero2_a100_80gb", "zero2_h100", "zero2_cpu", *worlds, program=PLANTED)


@pytest.fixture
def rows(run) -> dict[tuple[str, int, int], dict]:
    """By configuration, stage and world."""
    return {(row["configuration"], row["stage"], row["world"]): row for row in run[1]}


def test_every_case_has_a_row(rows):
    assert rows.keys() == {(name, stage, w) for name in (GPU, "zero2_cpu") for stage in (1, 2) for w in (1, 3, 8)}
    assert {row["accelerator"] for (name, *_), row in rows.items() if name == GPU} == {"cuda"}


@pytest.mark.parametrize("name", [GPU, "zero2_cpu"])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_eight_ranks_ask_for_is_what_arithmetic_says(rows, name: str, stage: int):
    row = rows[name, stage, 8]
    assert row["ranks compared"] == [0, 7] and row["difference"] is None
    gradients, parameters, features, other, hosts = (row["purposes"][each] for each in collectives.PURPOSES)
    assert gradients["sent"] == gradients["received"] == FP32 * row["trained parameters"]
    assert 0 <= parameters["sent"] - gradients["sent"] / 8 < 2 * 2 * FP32  # both groups are padded to 2 elements a rank
    assert features["sent"] == 2 * BATCH * workload.preset("tiny").embed_dim * FP32
    assert parameters["received"] == 8 * parameters["sent"] and features["received"] == 8 * features["sent"]
    assert other["sent"] <= 2 * FP32 and hosts["collectives"] == 0
    over_link = 2 * gradients["sent"] * 7 / 8 + 7 * parameters["sent"] + 7 * features["sent"] + other["over link"]
    assert row["bytes over link a step"] == pytest.approx(over_link)


@pytest.mark.parametrize("name", [GPU, "zero2_cpu"])
def test_the_stages_divide_what_is_kept_and_not_what_is_sent(rows, name: str):
    first, second = (rows[name, stage, 8]["purposes"] for stage in (1, 2))
    for each in ("gradients", "parameters", "features"):
        assert first[each]["sent"] == second[each]["sent"] > 0


@pytest.mark.parametrize("name", [GPU, "zero2_cpu"])
@pytest.mark.parametrize("stage", [1, 2])
def test_one_rank_sends_nothing_over_a_link(rows, name: str, stage: int):
    row = rows[name, stage, 1]
    assert row["bytes over link a step"] == 0
    assert row["purposes"]["gradients"]["sent"] == FP32 * row["trained parameters"]  # DeepSpeed asks all the same


@pytest.mark.parametrize("name", [GPU, "zero2_cpu"])
def test_ranks_that_would_wait_for_ever_are_named(run, rows, name: str):
    status, _, said = run
    assert status == 1
    larger, backwards = (rows[name, stage, 3]["difference"] for stage in (1, 2))
    assert f"{name}, ZeRO-1, 3 ranks: collective 1 of the phase 'queues': rank 0 asks for" in larger
    assert "all-gather of 2048 bytes" in larger and "rank 2 for all-gather of 4096 bytes" in larger
    assert f"{name}, ZeRO-2, 3 ranks: collective 3 of the phase 'optimizer': rank 0 asks for all-gather" in backwards
    assert {larger, backwards} <= set(said.splitlines())


def test_a_machine_with_a_gpu_counts_for_the_cpu_what_one_without_counts(rows):
    arguments = ("--deepspeed", "zero2_cpu", "--world", "8", "--stage", "2")
    status, (row,), said = counted(*arguments, program=ON_A_GPU)
    assert (status, said) == (0, "")
    assert row == rows["zero2_cpu", 2, 8] and row["accelerator"] == "cpu"


def test_a_missing_collective_is_a_difference():
    (configuration,) = collectives.configurations(["zero2_cpu"])
    case = collectives.Case(configuration, stage=2, world=8, ranks=(0, 3))
    flag = ["allreduce_", 4, 4, "torch.float32", None, "cpu", "main"]
    asked = {**dict.fromkeys(collectives.PHASES, []), "optimizer": [flag, flag]}
    assert collectives.first_difference(case, [asked, asked]) is None
    said = collectives.first_difference(case, [asked, {**asked, "optimizer": [flag]}])
    assert "collective 2 of the phase 'optimizer'" in said and "rank 3 for nothing more" in said


def test_a_root_gets_alone_what_is_reduced_to_it():
    reduced = Asked("reduce_", 800, 800, "torch.float32", 3, "cuda", "side")
    assert [reduced.got_by(rank) for rank in (0, 3)] == [0, 800]
    assert reduced.over_link(8) == 700
    with pytest.raises(ValueError, match="no rule for the collective alltoall_"):
        Asked("alltoall_", 8, 8, "torch.float32", None, "cuda", "main").over_link(8)


@pytest.mark.parametrize(("number", "ranks"), [(1, (0,)), (2, (0, 511)), (3, (0, 255, 511)), (600, tuple(range(512)))])
def test_ranks_are_spread_from_the_first_to_the_last(number: int, ranks: tuple[int, ...]):
    assert collectives.spread(512, number) == ranks


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--deepspeed", "zero3"], "ds_configs has no zero3; choose from zero2_a100_40gb"),
        (["--batch", "12"], "--batch is 12, and captions come in whole eights"),
        (["--world", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_named(capsys, arguments: list[str], said: str):
    with pytest.raises(SystemExit) as ended:
        collectives.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_count_that_fails_says_why(capsys, monkeypatch):
    monkeypatch.setattr(collectives, "WORKER", (sys.executable, "-c", "raise RuntimeError('no C++ compiler')"))
    assert collectives.main([*TINY, "--world", "8", "--deepspeed", "zero2_cpu"]) == 2
    assert "RuntimeError: no C++ compiler" in capsys.readouterr().err
