"""The timing benchmark on the tiny model: everything runs, and rivals compute the same step."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import batch_sizes, contenders, flops, measure, scaling, step, workload

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


def asked(**given) -> argparse.Namespace:
    return argparse.Namespace(**{"seconds": 0.05, "least": 3, "warmup": 0, **given})


def test_a_rivals_failure_is_a_row(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(contenders, "_reference", broken)
    given = ("ours fp32", "reference"), workload.preset("tiny"), CPU, 4, "full", time.monotonic() + 60, asked()
    rows = list(step.compare(*given))
    assert {row["contender"]: row.get("error") for row in rows} == {
        "ours fp32": None,
        "reference": "RuntimeError: out of order",
    }


@pytest.mark.parametrize("name", ["reference", "modernised"])
def test_a_rival_without_a_negative_to_draw_is_refused_before_it_draws(name):
    config = workload.preset("tiny")
    with pytest.raises(ValueError, match="at least 2 samples"):
        contenders.build(name, config, CPU, workload.captions_batch(config, "full", 1))


def test_flops_are_those_of_the_batch_that_is_timed():
    """Also of a rival whose layers are compiled: a compiled region shows no operator."""
    config, batch = workload.preset("tiny", dropout=0.0), 8
    for name, kind in (("ours fp32", flops.ours), ("reference", flops.reference)):
        data = workload.captions_batch(config, "mean14", batch)
        contender = contenders.build(name, config, CPU, data)
        found = step.rates(contender, CPU, batch, samples_per_s=2.0)
        counted = flops.per_sample(config, workload.lengths_of("mean14", batch))[
            "reference" if kind is flops.reference else "ours"
        ]
        assert found["FLOP a sample"] == pytest.approx(counted, rel=0.05)  # negatives are drawn: other texts are read
        assert found["FLOP/s"] == 2 * found["FLOP a sample"]
    compiled = torch.compile(torch.nn.Linear(8, 8), backend="eager")
    x = torch.randn(3, 8)
    assert step.rates(lambda: compiled(x), CPU, 3, 1.0)["FLOP a sample"] == 2 * 8 * 8


def test_batch_sizes_end_with_whatever_ends_them(monkeypatch):
    """A batch that fails otherwise than for memory is a row too, and the other contenders go on."""

    def measured(name, config, device, captions, batch):
        if name == "ours bf16" and batch == 32:
            return {"error": "OutOfResources: shared memory"}
        return {"samples/s": 100.0 * batch if batch < 64 else 90.0, "peak bytes": None}

    monkeypatch.setattr(batch_sizes, "measured", measured)
    monkeypatch.setattr(batch_sizes, "LARGEST", 128)
    kept: list[dict] = []
    rows = batch_sizes.sweep(["ours bf16", "reference"], None, CPU, "full", 1.0, kept.append)
    assert rows == kept and [row["batch"] for row in rows if row["contender"] == "reference"] == [8, 16, 32, 64, 128]
    ours, reference = batch_sizes.best(rows)
    assert (ours["largest batch"], ours["ended by"]) == (16, "OutOfResources: shared memory")
    assert (reference["largest batch"], reference["quickest batch"]) == (128, 32)
    assert batch_sizes.sweep(["reference"], None, CPU, "full", -1.0, kept.append) == []


def test_a_real_size_is_measured_and_a_real_failure_told():
    config = workload.preset("tiny")
    assert batch_sizes.measured("ours fp32", config, CPU, "full", 2)["samples/s"] > 0
    assert batch_sizes.measured("nobody", config, CPU, "full", 2)["error"].startswith("ValueError: unknown contender")


def test_killed_at_a_random_moment_it_leaves_its_finished_rows(tmp_path: Path):
    """A real process; what is killed is a comparison that would have gone on for minutes."""
    command = [sys.executable, "-m", "benchmarks.step", "--device", "cpu", "--preset", "tiny", "--batch", "4"]
    command += ["--contenders", "ours fp32", "reference", "--seconds", "0.3", "--minutes", "20", "--out", str(tmp_path)]
    command += ["--captions", *["full"] * 300]
    rows = tmp_path / "step.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=measure.ROOT) as process:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (rows.exists() and len(measure.read_rows(rows)) > 4):
            time.sleep(0.02)
        time.sleep(random.random() / 3)
        process.kill()
    head, *found = measure.read_rows(rows)
    assert head["what"] == "head" and head["environment"]["commit"]
    assert len(found) >= 4 and all(row["median"] > 0 and row["FLOP a sample"] > 0 for row in found)
    whole = json.loads((tmp_path / "step.json").read_text())  # as far as it had come
    assert len(whole["steps"]) >= 2 and whole["steps"][0].items() <= found[0].items()


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
