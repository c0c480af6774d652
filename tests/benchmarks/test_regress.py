"""The regression check from end to end on the tiny model, counts only: they do not wobble."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from albef_ds.tasks.pretraining import Pretraining
from benchmarks import counts, history, regress, workload

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
    assert collected["collectives a step, 8 ranks, tiny"] > 0
    assert collected["launches a step on a GPU, tiny"] > 1000
    missing = {name for name, value in collected.items() if value is None}
    on_a_gpu = {"waits for the GPU a step", "kernel launches a step"}
    assert missing == on_a_gpu | {f"instructions: {name}" for name in counts.INSTRUCTIONS}


def test_zero_costs_calls_of_every_trained_tensor(collected: dict):
    """DeepSpeed's backward hooks are seen, which C++ calls."""
    plain, zero2 = (collected[f"Python calls in DeepSpeed a step, stage {stage}, tiny"] for stage in (0, 2))
    trained = sum(p.requires_grad for p in Pretraining(workload.preset("tiny")).parameters())
    assert zero2 - plain > 30 * trained


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
        content["counts"]["collectives a step, 8 ranks, tiny"] -= 1

    assert regress.main(changed(baseline, change)) == regress.CHANGED


@pytest.mark.parametrize(
    "name, more",
    [
        ("launches a step on a GPU, base", 1),
        ("bytes a step on a GPU, base", 1e9),
        ("FLOP a step on a GPU, base", 1e11),
        ("Python calls a step, stage 0, base", 419),  # one for each tensor that is trained
        ("Python calls in DeepSpeed a step, stage 2, base", 419),
        ("operators under DeepSpeed a step, stage 2, base", 419),
        ("collectives a step, 8 ranks, base", 1),
        ("bytes handed to collectives a step, 8 ranks, base", 1e7),
    ],
)
def test_little_more_or_less_than_what_is_committed_fails(name: str, more: float):
    committed = json.loads((regress.FOLDER / "cpu.json").read_text())
    for change in (0, more, -more):
        now = copy.deepcopy(committed)
        now["counts"][name] += change
        status = regress.verdict(*regress.compare(now, committed, "cpu"))
        assert status == (regress.CHANGED if change else regress.PASSED)


PLANTED = """
import os, sys
from benchmarks import fake_gpu, roofline
fake_gpu.install()
import torch
from albef_ds.tasks.pretraining import Pretraining
start = Pretraining.start_step
Pretraining.start_step = lambda *a, **k: (start(*a, **k), torch.empty(125_000_000, device="cuda").neg_())
status = roofline.main()
sys.stdout.flush()
os._exit(status)
"""


def test_a_launch_and_a_gigabyte_put_into_the_step_fail_both(baseline: Path, monkeypatch, capsys):
    monkeypatch.setattr(counts, "program", lambda module: ("-c", PLANTED))
    now = json.loads(baseline.read_text())["counts"] | counts.gpu_counts("tiny")
    monkeypatch.setattr(counts, "collect", lambda *_: now)
    assert regress.main([*ARGUMENTS, "--baseline", str(baseline), "--json"]) == regress.CHANGED
    found = json.loads(capsys.readouterr().out)["findings"]
    changed = {f["name"]: (f["kind"], f["now"] - f["baseline"]) for f in found if f["kind"] != "same"}
    assert changed.keys() == {f"{name} a step on a GPU, tiny" for name in ("launches", "bytes")}
    assert changed["launches a step on a GPU, tiny"] == ("worse", 1)
    assert changed["bytes a step on a GPU, tiny"] == ("worse", pytest.approx(1e9))


def test_calls_are_compared_on_the_same_python_alone(baseline: Path):
    now = json.loads(baseline.read_text())
    then = copy.deepcopy(now)
    then["counts"]["Python calls a step, stage 0, tiny"] *= 2
    assert regress.verdict(*regress.compare(now, then, "cpu")) == regress.CHANGED
    then["environment"]["python"] = "3.99.1"
    findings, left = regress.compare(now, then, "cpu")
    assert regress.verdict(findings, left) == regress.PASSED
    assert sum("counted under Python 3.99" in reason for reason in left) == 4


@pytest.mark.parametrize(
    "key, value", [("device", "nvidia_a100"), ("versions", {"torch": "1.8.0"}), ("preset", "base")]
)
def test_another_device_or_version_is_no_baseline(baseline: Path, capsys, key, value):
    assert regress.main(changed(baseline, lambda content: content.update({key: value}))) == regress.NO_BASELINE
    assert "no baseline" in capsys.readouterr().err


def test_no_file_is_no_baseline(tmp_path: Path):
    assert regress.main([*ARGUMENTS, "--baseline", str(tmp_path / "none.json")]) == regress.NO_BASELINE


def test_what_cannot_be_counted_here_is_no_pass(baseline: Path, monkeypatch, capsys):
    def fails(*_):
        return counts.answer_of("roofline", "--batch", "0")

    monkeypatch.setattr(counts, "collect", fails)
    assert regress.main([*ARGUMENTS, "--baseline", str(baseline)]) == regress.NO_BASELINE
    assert "benchmarks.roofline failed" in (said := capsys.readouterr().err) and "--batch must be at least 1" in said


def test_what_takes_too_long_is_no_pass(monkeypatch):
    monkeypatch.setattr(counts, "LONGEST", 0.01)
    with pytest.raises(counts.CountingError, match="benchmarks.roofline was not done after 0.01 s"):
        counts.answer_of("roofline")


DIFFERING = """
import json, sys
row = {"collectives a step": 3, "bytes a step": 9, "difference": "rank 7: an all_gather more"}
print(json.dumps({"rows": [row]}))
sys.exit(1)
"""


def test_ranks_that_differ_are_a_change(baseline: Path, monkeypatch):
    committed = json.loads(baseline.read_text())["counts"]
    name = "ranks differ in their collectives, 8 ranks, tiny"
    assert committed[name] == 0
    monkeypatch.setattr(counts, "program", lambda module: ("-c", DIFFERING))
    assert (now := counts.collective_counts("tiny"))[name] == 1
    monkeypatch.setattr(counts, "collect", lambda *_: committed | {name: now[name]})
    assert regress.main([*ARGUMENTS, "--baseline", str(baseline)]) == regress.CHANGED


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "Invalid JSON"),
        ("[]", "the file"),
        ("{}", "device"),
        (None, "times"),
    ],
)
def test_a_file_that_is_no_baseline_is_told_before_anything_is_counted(baseline: Path, monkeypatch, capsys, text, said):
    monkeypatch.setattr(counts, "collect", lambda *_: pytest.fail("counted"))
    if text is None:
        text = json.dumps({key: value for key, value in json.loads(baseline.read_text()).items() if key != "times"})
    baseline.write_text(text)
    assert regress.main([*ARGUMENTS, "--baseline", str(baseline)]) == regress.NO_BASELINE
    assert "no baseline: cpu.json is none: " in (told := capsys.readouterr().err) and said in told


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "cuda"], "torch sees no GPU"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "neither cpu nor cuda"),
        (["--results", __file__], "is a file, and a folder is needed"),
    ],
)
def test_what_cannot_be_asked_for_ends_with_2(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        regress.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


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
