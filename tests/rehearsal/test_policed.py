"""Evaluation of every task, a loaded model's use and DALI's loader, on a GPU that computes on the CPU and refuses what
CUDA refuses of two devices (policed.py); and that it does catch faults which only a GPU would show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal import police_cases

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """{case: its row}, of one process that runs them all."""
    command = [sys.executable, "-m", "tests.rehearsal.police"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
    if done.returncode:
        pytest.fail(f"the rehearsal did not come to its end:\n{done.stderr[-3000:]}", pytrace=False)
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", police_cases.ALL, ids=lambda case: case.name)
def test_the_police_lets_pass_what_cuda_takes_and_refuses_the_rest(rows, case):
    row = rows[case.name]
    if case.refused is None:
        assert not row["error"], f"{row['error']}, at {', '.join(row['where'])}"
    else:
        assert re.search(case.refused, row["error"]), f"got {row['said'] or row['error']}"
