"""Plans: whole queues are covered, defaults exist for every shape, tuning is bounded and remembered."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albef_ds.kernels import launch, queue_contrastive_loss, tuning
from albef_ds.kernels.launch import Tile
from tests.kernels.cases import Case, check, make


@given(st.integers(0, 10**7), st.integers(1, 256), st.sampled_from((16, 32, 64)))
def test_splits_cover_the_queue_in_whole_tiles(length, splits, width):
    columns = launch.columns_per_split(length, splits, Tile(64, width))
    assert columns % width == 0 and columns >= width
    assert splits * columns >= length


@given(st.integers(1, 64), st.integers(0, 5000), st.sampled_from((108, 132)))
def test_the_chosen_number_of_splits_is_in_bounds(groups, tiles, slots):
    assert 1 <= launch.choose_splits(groups, tiles, slots) <= launch.MAX_SPLITS


def test_one_wave_of_programs_at_the_papers_size():
    """B = 64, M = 65,536: two directions fill an A100 (108) and an H200 (132) once, and no cut would be shorter."""
    for slots in (108, 132):
        splits = launch.choose_splits(2, 1024, slots)
        assert 2 * (splits + 1) <= slots
        assert -(-1024 // splits) == -(-1024 // (slots // 2 - 1))


@pytest.mark.parametrize("arch", (*launch.SHARED_MEMORY, 75, 121))
def test_default_tiles_exist_for_every_dtype_and_dim(arch):
    for dtype in launch.DTYPES:
        for dim in (1, 16, 24, 100, 256, 300, 512):
            for batch in (1, 33, 1024):
                for with_ids in (False, True):
                    for tile in launch.default_tiles(arch, dtype, batch, dim, with_ids):
                        options = tile.options(dim)
                        assert options["BLOCK_D"] >= dim
                        assert options["BLOCK_D"] % options["BLOCK_K"] == options["BLOCK_D"] % options["BLOCK_O"] == 0


def test_tuning_keeps_the_fastest_and_only_the_listed(cache_file, monkeypatch, device, triton_runs):
    times = iter([3.0, 1.0] + [2.0] * 100)
    problem = make(Case(5, 40, 24, 0.07, 0.4, False), torch.bfloat16, device)

    def clock(call):
        call()
        return next(times)

    default = launch.default_plan(device, torch.bfloat16, 5, 40, 24, False)
    plans = tuning.candidates(default, 5, 40, 24, 8)
    assert plans[0] == default and len(plans) <= 32
    best, results = tuning.tune(5, 40, 24, torch.bfloat16, seconds=0.0, clock=clock, device=device)
    assert best == default and len(results) == 1  # out of time after the default
    times = iter([3.0, 1.0] + [2.0] * 100)
    monkeypatch.setattr(tuning, "candidates", lambda *a: plans[:3])
    best, results = tuning.tune(5, 40, 24, torch.bfloat16, seconds=60.0, clock=clock, device=device)
    assert best == plans[1] and len(results) == 3
    (entry,) = json.loads(cache_file.read_text()).values()
    assert Tile(**entry["statistics"]) == best.statistics and entry["splits"] == best.splits
    launch.force((), best)
    check(problem, "triton")


def test_a_broken_cache_file_is_no_cache_file(cache_file, triton_runs, device):
    cache_file.write_text("{")
    assert launch.tuned() == {}
    problem = make(Case(5, 40, 24, 0.07, 0.4, False), torch.float32, device)
    problem.run(queue_contrastive_loss, impl="triton")


def test_tiles_follow_from_the_shared_memory_of_a_chip_that_nobody_listed():
    for unknown, like in ((87, 80), (103, 100), (121, 120)):
        shape = torch.bfloat16, 64, 512, False
        known = launch.default_tiles(like, *shape)
        assert launch.default_tiles(unknown, *shape, shared=launch.SHARED_MEMORY[like]) == known
    assert launch.default_tiles(999, *shape) == launch.default_tiles(86, *shape) != launch.default_tiles(80, *shape)


def test_a_gpus_own_shared_memory_decides(monkeypatch):
    """Also with a PyTorch that does not tell it."""
    gpu = torch.device("cuda")
    shape = torch.bfloat16, 64, 65536, 512, False
    for arch, like, told in ((80, 80, True), (87, 80, True), (86, 86, True), (90, 90, False), (120, 86, False)):
        chip = SimpleNamespace(major=arch // 10, minor=arch % 10, multi_processor_count=100)
        if told:
            chip.shared_memory_per_block_optin = launch.SHARED_MEMORY[like]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, chip=chip: chip)
        plan = launch.default_plan(gpu, *shape)
        assert (plan.statistics, plan.gradient) == launch.default_tiles(like, *shape[:2], *shape[3:])


def test_kernels_compile_without_spills_for_all_chips():
    """ALBEF's own D in bf16 and fp32; `python -m benchmarks.compile_report` compiles the whole list."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--quick", "--json"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_86", "sm_90"}
    assert {row["kernel"] for row in rows} == {"statistics", "combine", "gradient", "reduce", "finish", "race"}


def test_the_compile_report_names_what_is_wrong():
    from benchmarks.compile_report import problems

    fine = {"spills": 0, "shared bytes": 100_000, "matrix": 64, "async": 8}
    assert problems(fine, 80, True) == []
    assert problems(fine | {"spills": 3}, 80, False) == ["3 spill instructions"]
    assert "163" not in "".join(problems(fine | {"shared bytes": 180 * 1024}, 90, True))
    assert problems(fine | {"shared bytes": 180 * 1024}, 80, True)[0].startswith("184320 bytes of shared memory")
    assert problems(fine | {"matrix": 0, "async": 0}, 90, True) == ["tensor cores unused", "no asynchronous copies"]
