"""One folder, two runs: the second is refused and changes nothing. What only reads a run's folder stays allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from albef_ds.folder_lock import OWNER
from tests.reliability.processes import ROOT, run_faulty, started, until
from tests.training_run import metrics, write_recipe


def albef_ds(*arguments: object) -> subprocess.CompletedProcess:
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "albef_ds", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)


def test_the_second_run_is_refused_the_first_goes_on_and_readers_are_let_in(tmp_path):
    recipe = str(write_recipe(tmp_path, train={"max_steps": 20}, log={"report": False}))
    run = tmp_path / "run"
    settings = [recipe, "data.workers=2", "data.loader=torch"]
    with started([{"do": "wait_for", "file": str(tmp_path / "go"), "step": 6}], settings, tmp_path) as first:
        assert until(lambda: (run / "checkpoints" / "step_00000004" / "manifest.json").exists(), 120), first.outputs
        owner = json.loads((run / OWNER).read_text())
        assert owner["process"] == first.processes[0].pid
        config = (run / "config.yaml").read_bytes()
        second = tmp_path / "second"
        second.mkdir()
        ended = run_faulty([], [recipe, "train.seed=7"], second)
        assert ended.codes == [2, 2], ended
        said = [line for output in ended.outputs for line in output.splitlines() if "is in use" in line]
        assert len(said) == 1, ended
        expected = f"albef_ds: {run} is in use by process {owner['process']} on {owner['host']} (user {owner['user']}, "
        assert said[0].startswith(f"{expected}since {owner['since']}; "), said
        assert (run / "config.yaml").read_bytes() == config and not (run / "bad_steps.json").exists()

        report = albef_ds("report", run)
        assert report.returncode == 0 and (run / "report.html").exists(), report
        verified = albef_ds("checkpoint", "verify", run)
        assert verified.returncode == 0, verified
        pruned = albef_ds("checkpoint", "prune", run, "--yes")
        assert pruned.returncode == 2 and "is in use by process" in pruned.stderr, pruned
        assert first.processes[0].poll() is None
        (tmp_path / "go").touch()
        assert first.wait(120) == [0, 0], first.outputs
    assert sorted(metrics(run)) == list(range(1, 21))
    assert not (run / OWNER).exists()


@pytest.mark.slow
def test_what_evaluates_is_let_in_and_may_not_write_there(tmp_path):
    recipe = str(write_recipe(tmp_path, train={"max_steps": 8}, data={"workers": 2, "loader": "torch"}))
    run = tmp_path / "run"
    ended = run_faulty([], [recipe], tmp_path)
    assert ended.codes == [0, 0], ended
    weights = [recipe, run / "albef.pth", f"data.test={tmp_path / 'data' / 'test.json'}", "evaluation.k_test=4"]
    waits = {"do": "wait_for", "file": str(tmp_path / "never"), "step": 9}
    with started([waits], [recipe, "train.max_steps=30"], tmp_path, tag="longer") as longer:
        assert until(lambda: "max_steps: 30" in (run / "config.yaml").read_text(), 120), longer.outputs
        summary = (run / "summary.json").read_bytes()
        into_it = albef_ds("evaluate", *weights, "--out", run)
        assert into_it.returncode == 2 and "is in use by process" in into_it.stderr, into_it
        assert "max_steps: 30" in (run / "config.yaml").read_text() and (run / "summary.json").read_bytes() == summary
        beside = albef_ds("evaluate", *weights, "--out", tmp_path / "evaluated")
        assert beside.returncode == 0 and (tmp_path / "evaluated" / "summary.json").exists(), beside
        assert [p.poll() for p in longer.processes] == [None, None]
