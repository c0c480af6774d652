"""Twenty runs killed with SIGKILL, a random rank at a random moment, saves included: each ends bitwise where the
undisturbed run ends. `ALBEF_KILL_SEEDS=3,5` runs those of these seeds only; a failure names its seed."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.reliability.processes import run_faulty
from tests.reliability.test_faults import assert_equal_runs
from tests.training_run import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 10
SEEDS = [int(s) for s in os.environ.get("ALBEF_KILL_SEEDS", "").split(",") if s] or range(20)


def recipe(folder: Path) -> str:
    # A checkpoint at every other step: about every second kill falls into the writing of one.
    return str(write_recipe(folder, train={"max_steps": STEPS}, checkpoint={"every": 2}))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run_faulty([], [recipe(folder)], folder, seconds=400)
    assert ended.codes == [0, 0], ended
    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_anywhere(undisturbed, tmp_path, seed):
    chance = random.Random(seed)
    arguments = [recipe(tmp_path), "faults.dead_seconds=5"]
    for attempt in range(chance.randint(1, 2)):
        rank, seconds = chance.randint(0, 1), chance.uniform(0, 2.5)
        print(f"seed {seed}, kill {attempt + 1}: rank {rank}, {seconds:.2f} s after the loop began")
        kill = {"do": "kill_after", "rank": rank, "seconds": seconds}
        ended = run_faulty([kill], arguments, tmp_path, seconds=400)
        assert ended.codes[rank] in (-signal.SIGKILL, 0), ended  # 0: it was through before
        assert None not in ended.codes, ended
    ended = run_faulty([], arguments, tmp_path, seconds=400)
    assert ended.codes == [0, 0], ended
    assert_equal_runs(undisturbed, tmp_path, STEPS)
