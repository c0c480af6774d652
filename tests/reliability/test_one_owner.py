"""One folder, two runs: the second is refused and changes nothing. What only reads a run's folder stays allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from albef_ds.folder_lock import OWNER
from tests.reliability.processes import ROOT, run_faulty, started, until
from tests.training_run import metrics, write_recipe


def albef_ds(*arguments: object) -> subprocess.CompletedProcess:
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "albef_ds", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


def held(folder: Path, step: int) -> dict:
    """The fault that keeps a run before this step."""
    return {"do": "wait_for", "file": str(folder / "go"), "step": step}


def test_the_second_run_is_refused_and_told_and_the_first_goes_on(tmp_path):
    recipe = str(write_recipe(tmp_path, train={"max_steps": 6}, data={"workers": 2, "loader": "torch"}))
    run, second = tmp_path / "run", tmp_path / "second"
    second.mkdir()
    with started([held(tmp_path, 5)], [recipe], tmp_path) as first:
        assert until(lambda: (run / "checkpoints" / "step_00000004" / "manifest.json").exists(), 120), first.outputs
        owner, config = json.loads((run / OWNER).read_text()), (run / "config.yaml").read_bytes()
        assert owner["process"] == first.processes[0].pid
        ended = run_faulty([], [recipe, "train.seed=7"], second)
        assert ended.codes == [2, 2], ended
        said = [line for output in ended.outputs for line in output.splitlines() if "is in use" in line]
        assert len(said) == 1, ended
        expected = f"albef_ds: {run} is in use by process {owner['process']} on {owner['host']} (user {owner['user']}, "
        assert said[0].startswith(f"{expected}since {owner['since']}; "), said
        assert (run / "config.yaml").read_bytes() == config
        (tmp_path / "go").touch()
        assert first.wait(120) == [0, 0], first.outputs
    assert sorted(metrics(run)) == list(range(1, 7))
    assert not (run / OWNER).exists()


@pytest.mark.slow
def test_what_reads_is_let_in_and_what_would_write_is_not(tmp_path):
    recipe = str(write_recipe(tmp_path, train={"max_steps": 8}, data={"workers": 2, "loader": "torch"}))
    run = tmp_path / "run"
    ended = run_faulty([], [recipe], tmp_path)
    assert ended.codes == [0, 0], ended
    weights = [recipe, run / "albef.pth", f"data.test={tmp_path / 'data' / 'test.json'}", "evaluation.k_test=4"]
    with started([held(tmp_path, 9)], [recipe, "train.max_steps=30"], tmp_path, tag="longer") as longer:
        assert until(lambda: "max_steps: 30" in (run / "config.yaml").read_text(), 120), longer.outputs
        summary = (run / "summary.json").read_bytes()
        for command in (["evaluate", *weights, "--out", run], ["checkpoint", "prune", run, "--yes"]):
            refused = albef_ds(*command)
            assert refused.returncode == 2 and "is in use by process" in refused.stderr, refused
        assert "max_steps: 30" in (run / "config.yaml").read_text() and (run / "summary.json").read_bytes() == summary
        for command in (
            ["report", run],
            ["checkpoint", "verify", run],
            ["checkpoint", "list", run],
            ["checkpoint", "prune", run],
            ["evaluate", *weights, "--out", tmp_path / "evaluated"],
        ):
            let_in = albef_ds(*command)
            assert let_in.returncode == 0, let_in
        assert (run / "report.html").exists() and (tmp_path / "evaluated" / "summary.json").exists()
        assert [p.poll() for p in longer.processes] == [None, None]
