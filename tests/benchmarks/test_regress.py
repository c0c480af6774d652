"""The regression check from end to end on the tiny model, counts only: they do not wobble."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import counts, history, regress, scaling, workload

ARGUMENTS = ["--device", "cpu", "--preset", "tiny", "--counts-only"]


@pytest.fixture(scope="module")
def collected() -> dict:
    return counts.collect(torch.device("cpu"), "tiny")


@pytest.fixture(autouse=True)
def no_second_collection(collected, monkeypatch):
    monkeypatch.setattr(counts, "collect", lambda *args: dict(collected))


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    path = tmp_path / "cpu.json"
    assert regress.main([*ARGUMENTS, "--record", "--baseline", str(path)]) == regress.PASSED
    return path


def changed(path: Path, change) -> list[str]:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return [*ARGUMENTS, "--baseline", str(path)]


def test_counts_are_whole_and_repeat(collected: dict):
    device = torch.device("cpu")
    assert collected["graph breaks"] == 0
    assert counts.step_counts(device) == {k: collected[k] for k in counts.step_counts(device)}
    assert collected["collectives a step, 8 ranks"] > 0
    missing = {name for name, value in collected.items() if value is None}
    assert all("GPU" in name or "kernel launches" in name or "instructions" in name for name in missing)


def test_the_paper_agrees_with_what_deepspeed_asks_for(collected: dict):
    """What a rank of 8 hands over: all its gradients, its share of the parameters, its features; little else."""
    config = workload.preset("tiny")
    sizes = scaling.sizes_of(config)
    expected = 4 * sizes.trained + 4 * sizes.trained / 8 + 2 * 8 * config.embed_dim * 4
    assert collected["bytes handed to collectives a step, 8 ranks"] == pytest.approx(expected, rel=1e-3)


def test_the_same_tree_passes(baseline: Path, capsys):
    assert regress.main([*ARGUMENTS, "--baseline", str(baseline)]) == regress.PASSED
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_more_work_and_unexplained_less_both_fail(baseline: Path, factor: float):
    def change(content: dict) -> None:
        content["counts"]["FLOP a sample, tiny, mean14"] *= factor

    assert regress.main(changed(baseline, change)) == regress.CHANGED


def test_one_more_collective_fails(baseline: Path):
    def change(content: dict) -> None:
        content["counts"]["collectives a step, 8 ranks"] -= 1

    assert regress.main(changed(baseline, change)) == regress.CHANGED


@pytest.mark.parametrize(
    "key, value", [("device", "nvidia_a100"), ("versions", {"torch": "1.8.0"}), ("preset", "base")]
)
def test_another_device_or_version_is_no_baseline(baseline: Path, capsys, key, value):
    assert regress.main(changed(baseline, lambda content: content.update({key: value}))) == regress.NO_BASELINE
    assert "no baseline" in capsys.readouterr().err


def test_no_file_is_no_baseline(tmp_path: Path):
    assert regress.main([*ARGUMENTS, "--baseline", str(tmp_path / "none.json")]) == regress.NO_BASELINE


def test_times_of_another_chip_are_not_compared(baseline: Path):
    now = json.loads(baseline.read_text())
    now["times"] = {"step": {"median": 0.7, "low": 0.69, "high": 0.71, "pairs": 20}}
    then = copy.deepcopy(now)
    findings, left = regress.compare(now, then, "cpu")
    assert regress.verdict(findings, left) == regress.PASSED
    then["environment"]["device"] = "another chip"
    findings, left = regress.compare(now, then, "cpu")
    assert regress.verdict(findings, left) == regress.NO_BASELINE
    then["environment"]["device"], then["times"]["step"]["median"] = now["environment"]["device"], 0.5
    assert regress.verdict(*regress.compare(now, then, "cpu")) == regress.CHANGED


def test_history(baseline: Path, tmp_path: Path):
    found = json.loads(baseline.read_text())
    found["times"] = {"step": {"median": 0.7, "low": 0.69, "high": 0.71, "pairs": 20}}
    folder = tmp_path / "results"
    assert "No measurements" in history.render(folder)
    history.add(folder, found)
    (folder / "other.json").write_text("[1]")
    assert "time: step" in history.render(folder)
    assert (folder / "history.png").stat().st_size > 1000


def test_committed_baseline_is_one_of_this_check():
    content = json.loads((regress.FOLDER / "cpu.json").read_text())
    assert {"device", "versions", "preset", "environment", "counts", "times"} <= content.keys()
    assert content["device"] == "cpu"
