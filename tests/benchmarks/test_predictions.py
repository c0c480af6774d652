"""Predictions meet what is measured: the right card, the right step, the error as it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import chips, measure, predictions, regress, suite
from benchmarks import step as step_benchmark

CASE = {"preset": "base", "batch": 64, "captions": "histogram"}


def step(contender: str, launches: int, **more) -> dict:
    ms = {card: 10.0 * place for place, card in enumerate(chips.CHIPS, start=1)}
    return {"contender": contender, **CASE, "launches": launches, "gb": 1.0, "tflop": 2.0, "ms": ms, **more}


PREDICTED = {
    "commit": "abc",
    "time": "2026-01-01T00:00:00Z",
    "steps": [
        step("ours bf16", 100, attention="flash"),
        step("ours bf16", 110, attention="varlen"),
        step("ours bf16", 50, attention="varlen", preset="tiny", batch=8, captions="mean14"),
        step("modernised", 200),
    ],
    "kernels": [
        {"contender": "ours triton fp32", "B": 64, "M": 65536, "pass": "forward", "launches": 5, "ms": {"H100": 0.5}}
    ],
}
LANES = [
    {
        "lane": "step",
        "rows": [
            {"what": "head", "preset": "base"},
            {"what": "step", "contender": "ours bf16", "captions": "histogram", "batch": 64, "median": 30.0,
             "FLOP a sample": 3.5e10, "launches": 121},
            {"what": "step", "contender": "ours bf16", "captions": "full", "batch": 64, "median": 77.0},
            {"what": "step", "contender": "modernised", "captions": "histogram", "error": "out of memory"},
        ],
    },
    {"lane": "kernels", "rows": [{"kind": "loss", "contender": "ours triton fp32", "B": 64, "M": 65536,
                                  "pass": "forward", "ms": 1.0}]},
    {"lane": "regress", "rows": [{"counts": {"kernel launches a step": 45}}]},
]  # fmt: skip


def measured(device: str, *packages: str) -> dict[str, tuple[float, float]]:
    rows = predictions.beside(PREDICTED, {"device": device, "packages": dict.fromkeys(packages, "1")}, LANES)
    assert len(rows) == len({row["what"] for row in rows})
    return {row["what"]: (row["predicted"], round(row["error"], 6)) for row in rows}


def test_each_prediction_meets_its_measurement():
    ours = "ours bf16, base, 64, histogram"
    assert measured("NVIDIA H100 80GB HBM3") == {
        f"ms, {ours}": (20.0, 0.5),
        f"launches, {ours}": (110, 0.1),
        f"TFLOP, {ours}": (2.0, 0.12),
        "launches, ours bf16, tiny, 8, mean14": (50, -0.1),
        "ms, ours triton fp32, 64, 65536, forward": (0.5, 1.0),
    }


def test_with_flash_attn_its_prediction_is_meant():
    assert measured("NVIDIA H100 80GB HBM3", "flash-attn")["launches, ours bf16, base, 64, histogram"] == (100, 0.21)


def test_a_card_that_was_not_predicted_has_none():
    assert measured("AMD EPYC") == {}


def test_the_newest_counts(tmp_path):
    assert predictions.newest(tmp_path) is None
    for commit, time in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c", "2026-01-01")):
        found = PREDICTED | {"commit": commit, "time": time}
        (tmp_path / f"predictions-{commit}.json").write_text(json.dumps(found))
    assert predictions.newest(tmp_path)["commit"] == "a"


def test_the_suites_report_has_both_and_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "newest", lambda: PREDICTED)
    report = suite.Report(tmp_path, {"device": "NVIDIA H100 80GB HBM3", "commit": "def"})
    head = {"part": 2, "status": "passed", "seconds": 1.0, "output": "", "command": ""}
    for lane in LANES:
        report.add(head | lane)
    page = (tmp_path / "suite.md").read_text()
    assert "## Predicted at abc, and measured" in page
    assert "| ms, ours bf16, base, 64, histogram | 20 | 30 | +50.0 % | step |" in page
    assert len(json.loads((tmp_path / "suite.json").read_text())["predicted"]["rows"]) == 5


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[1]",
        '{"commit": "x"}',
        json.dumps({"commit": "x", "time": "9"}),
        json.dumps({**PREDICTED, "time": 9}),
        json.dumps({**PREDICTED, "commit": None}),
        json.dumps({**PREDICTED, "steps": [{"contender": "ours bf16"}]}),
        json.dumps({**PREDICTED, "steps": [step("ours bf16", 0)]}),
        json.dumps({**PREDICTED, "kernels": [{"contender": "ours triton fp32", "launches": 5, "ms": {"H200": 0}}]}),
    ],
)
def test_a_broken_file_is_named_and_what_is_measured_stays(tmp_path, monkeypatch, broken):
    (tmp_path / "predictions-a.json").write_text(json.dumps(PREDICTED))
    (tmp_path / "predictions-x.json").write_text(broken)
    with pytest.raises(ValueError, match="predictions-x.json holds no predictions"):
        predictions.newest(tmp_path)
    newest = predictions.newest
    monkeypatch.setattr(predictions, "newest", lambda: newest(tmp_path))
    report = suite.Report(tmp_path, {"device": "NVIDIA H200", "commit": "def"})
    report.add(LANES[0] | {"part": 2, "status": "passed", "seconds": 1.0, "output": "", "rows": [3]})
    assert "Predictions: predictions-x.json holds no predictions" in (tmp_path / "suite.md").read_text()


def test_rows_that_are_no_objects_are_passed_over():
    lanes = [{"lane": "odd", "rows": [3, "text"]}, *LANES]
    assert len(predictions.beside(PREDICTED, {"device": "NVIDIA H100 80GB HBM3"}, lanes)) == 5


def test_a_card_that_the_file_does_not_have_yet_is_left_out():
    older = json.loads(json.dumps(PREDICTED))
    for row in (*older["steps"], *older["kernels"]):
        row["ms"].pop("H100", None)
    rows = predictions.beside(older, {"device": "NVIDIA H100 80GB HBM3"}, LANES)
    assert [row["what"].split(",")[0] for row in rows] == ["launches", "TFLOP", "launches"]


WITHOUT = """
import sys
for name in ("deepspeed", "matplotlib", "PIL", "pydantic", "timm", "transformers", "triton", "yaml"):
    sys.modules[name] = None
from benchmarks import predictions, suite
assert predictions.newest()
"""


def test_a_bare_machine_reads_predictions_before_the_suite_has_installed_anything():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=measure.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_rows_of_a_real_benchmark_are_found(tmp_path):
    """Its rows have the names that predictions look for."""
    arguments = ["--preset", "tiny", "--batch", "4", "--captions", "histogram", "--contenders", "ours bf16"]
    assert step_benchmark.main([*arguments, "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 0
    expected = [step("ours bf16", 100, attention="varlen", preset="tiny", batch=4)]
    lanes = [{"lane": "step", "rows": suite.rows_of(tmp_path)}]
    rows = predictions.beside(PREDICTED | {"steps": expected, "kernels": []}, {"device": "NVIDIA H100"}, lanes)
    assert [row["what"] for row in rows] == [f"{name}, ours bf16, tiny, 4, histogram" for name in ("ms", "TFLOP")]


def test_predictions_are_of_the_step_that_the_baseline_counts():
    """Otherwise the step has changed since: `python -m benchmarks.predictions`. Of the tiny steps, the rivals' among
    them, tests/benchmarks/test_roofline.py says the same."""
    ours = predictions.newest()["steps"][0]
    counted = json.loads((regress.FOLDER / "cpu.json").read_text())["counts"]
    assert (ours["contender"], ours["attention"], ours["preset"]) == ("ours bf16", "flash", "base")
    for key, name, unit in (("launches", "launches", 1), ("gb", "bytes", 1e9), ("tflop", "FLOP", 1e12)):
        assert ours[key] * unit == pytest.approx(counted[f"{name} a step on a GPU, base"]), key


@pytest.mark.parametrize("card", chips.CHIPS)
def test_what_is_committed_predicts_every_card(card):
    found = predictions.newest()
    steps = {(s["contender"], s.get("attention"), s["preset"]): s for s in found["steps"]}
    ours, rival, reference = (
        steps[key]
        for key in (("ours bf16", "flash", "base"), ("modernised", None, "base"), ("reference", None, "base"))
    )
    assert 0 < ours["ms"][card] < rival["ms"][card] < reference["ms"][card]
    assert found["kernels"][0]["ms"][card] < ours["ms"][card] / 20
