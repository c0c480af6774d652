"""The timing benchmark on the tiny model: everything runs, and rivals compute the same step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, scaling, step, workload

CPU = torch.device("cpu")


def test_contenders_train_on_the_same_batch_with_the_same_result():
    """At dropout 0 and equal weights the first MLM and ITC losses agree (negatives are drawn, so ITM's may not)."""
    from albef_ds.model.reference_weights import load_reference

    config = workload.preset("tiny", dropout=0.0)
    batch = workload.captions_batch(config, "histogram", 4)
    ours, rival = (contenders.build(name, config, CPU, batch) for name in ("ours fp32", "reference"))
    load_reference(rival.model.state_dict(), ours.model.model, ours.model.teacher, ours.model.queue, "reference")
    for _ in range(3):
        found, theirs = ours(), rival()
        for name in ("itc", "mlm"):
            assert found[name].item() == pytest.approx(theirs[name].item(), rel=1e-2), name
    assert ours.state_bytes() == pytest.approx(rival.state_bytes(), rel=0.01)


def test_phases_add_up():
    clock = contenders.PhaseClock(CPU)
    clock._now = iter([0.0, 1.0, 3.0, 4.0, 5.0, 10.0]).__next__  # forward around teacher and queue
    with clock("forward"):
        with clock("teacher"):
            pass
        with clock("queue"):
            pass
    assert clock.seconds["teacher"] == 2.0 and clock.seconds["queue"] == 1.0 and clock.seconds["forward"] == 7.0


def test_step_from_the_command_line(tmp_path: Path, capsys):
    arguments = ["--device", "cpu", "--preset", "tiny", "--batch", "4", "--captions", "full", "--seconds", "0.1"]
    names = ["ours fp32", "ours bf16", "reference"]
    assert step.main([*arguments, "--contenders", *names, "--json", "--profile", "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["contender"] for row in found["steps"]] == names
    for row in found["steps"]:
        assert row["median"] > 0 and row["FLOP a sample"] > 0 and row["count"] >= 3
    assert {"median", "low", "high", "pairs"} <= found["steps"][0]["of"]["reference"].keys()
    assert any("GPU" in line for line in found["not measured"])
    assert "ours fp32" in (tmp_path / "step.md").read_text()
    assert (tmp_path / "ours_fp32.operations.txt").is_file()


def test_a_rivals_failure_is_a_row(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(contenders, "_reference", broken)
    rows = step.compare(("ours fp32", "reference"), workload.preset("tiny"), CPU, 4, "full", 0.05, 3, 0)
    assert {row["contender"]: row.get("error") for row in rows} == {
        "ours fp32": None,
        "reference": "RuntimeError: out of order",
    }


def test_scaling_on_paper():
    sizes = scaling.Sizes(trained=1000, teacher=900, queue=512, embed_dim=16)
    row = scaling.calculate(sizes, world=8, stage=2, batch=4, reduce="scatter", step_ms=None)
    assert row.reduce_bytes == row.gather_bytes == 7 / 8 * 4000
    assert row.feature_bytes == 7 * 2 * 4 * 16 * 4
    assert row.efficiency_none_hidden is None and row.compute_ms is None
    assert scaling.calculate(sizes, 8, 2, 4, "allreduce", None).reduce_bytes == 2 * row.reduce_bytes
    zero1 = scaling.calculate(sizes, 8, 1, 4, "scatter", 100.0)
    assert zero1.gradients_gib == 8 * row.gradients_gib and 0.99 < zero1.efficiency_none_hidden < 1


def test_scaling_takes_no_step_of_another_chip(tmp_path: Path):
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"environment": {"device": "AMD EPYC"}, "steps": []}))
    with pytest.raises(ValueError, match="AMD EPYC"):
        scaling.measured_step(path, 64)
    row = {"contender": "ours bf16", "batch": 64, "median": 90.0, "captions": "full"}
    path.write_text(json.dumps({"environment": {"device": "NVIDIA A100-SXM4-80GB"}, "steps": [row]}))
    assert scaling.measured_step(path, 64)[0] == 90.0
