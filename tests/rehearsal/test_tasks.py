"""Every task's training step would run on a GPU and wait for nothing, as far as can be known without one (tasks.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.rehearsal.cases import CASES, TASKS
from tests.rehearsal.plants import PLANTS
from tests.rehearsal.tasks import ROOT


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """What each case and each planted fault came to, by name. Two processes, for machines of two processors."""
    names = [rehearsed.name for rehearsed in (*CASES, *PLANTS)]
    command = [sys.executable, "-m", "tests.rehearsal.tasks", "--json"]
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, *half], **options, **pipes) for half in (names[::2], names[1::2])]
    found = {}
    for process in started:
        said, complaints = process.communicate()
        if process.returncode not in (0, 1) or not said:
            pytest.fail(f"the rehearsal did not come to its end: {complaints[-3000:]}", pytrace=False)
        found |= {row["name"]: row for row in map(json.loads, said.splitlines())}
    return found


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_step_runs_on_a_gpu_and_waits_for_nothing(rows, name):
    row = rows[name]
    assert not row["error"], f"{row['where']}: {row['error']}"


@pytest.mark.parametrize("task", TASKS)
def test_flops_are_those_of_the_task_whichever_kernel_computes_attention(rows, task):
    """flash-attn's operators are in no registry of PyTorch's: uncounted, a run's MFU reads too low."""
    assert rows[f"{task}-flash"]["flops"] == rows[f"{task}-varlen"]["flops"] > 0
    for other in ("varlen", "efficient"):
        if row := rows.get(f"{task}-{other}-no-dropout"):
            assert row["flops"] == rows[f"{task}-flash"]["flops"]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_noticed(rows, plant):
    error = rows[plant.name]["error"]
    assert plant.caught(error), f"expected {plant.said!r}, got {error or 'no error'}"
