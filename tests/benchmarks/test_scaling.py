"""benchmarks.scaling: the bytes it tells are those that DeepSpeed asks for, and they are those on paper."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling, workload


@pytest.fixture(scope="module")
def found() -> dict:
    """Of 8 GPUs; every way of reducing and both stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "WORLDS", (8,))
        return scaling.report("tiny", batch=8, step_ms=None, source="")


def test_the_paper_agrees_with_what_deepspeed_asks_for(found: dict):
    """All gradients, the parameters and the features go over the link; little else does."""
    assert found["bytes off paper by more than 0.1 %"] == []
    sizes = scaling.sizes_of(workload.preset("tiny"))
    for reduce, rows in found["rows"].items():
        assert [(row["stage"], row["world"]) for row in rows] == [(1, 8), (2, 8)]
        for row in rows:
            paper = scaling.on_paper(sizes, row["world"], batch=8, reduce=reduce)
            assert row["reduce_bytes"] == pytest.approx(paper.gradients, rel=1e-9)  # no bucket is padded
            assert row["gather_bytes"] == pytest.approx(paper.parameters, rel=1e-3) and row["collectives"] > 0
            assert row["feature_bytes"] == paper.features


def test_scatter_halves_the_gradients_bytes_by_more_collectives(found: dict):
    for whole, own in zip(found["rows"]["allreduce"], found["rows"]["scatter"], strict=True):
        assert whole["reduce_bytes"] == pytest.approx(2 * own["reduce_bytes"])
        assert own["collectives"] > whole["collectives"]


def test_bytes_that_are_not_those_on_paper_are_named(found: dict):
    paper = scaling.Sent(gradients=1000.0, parameters=500.0, features=10.0)
    assert scaling.Sent(1000.9, 500.0, 10.0).differences(paper) == []
    assert scaling.Sent(1000.0, 502.0, 10.0).differences(paper) == ["parameters: 502 bytes counted, 500 on paper"]
    assert "in scatter, ZeRO-2: off" in scaling.render(
        {**found, "bytes off paper by more than 0.1 %": ["scatter, ZeRO-2: off"]}
    )


def test_a_report_becomes_tables_and_a_picture(found: dict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "report", lambda *_: found)
    assert scaling.main(["--json", "--preset", "tiny", "--batch", "8", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "scaling.json").read_text()) == found
    assert (tmp_path / "scaling.md").read_text().count("| 8 | 2 |") == 2
    assert (tmp_path / "scaling.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--batch", "60"], "--batch is 60"),
        (["--step-ms", "-5"], "--step-ms must be more than 0, got -5"),
        (["--step-json", "none.json"], "No such file"),
        (["--step-json", "{}"], "is no result of benchmarks.step"),
        (["--step-json", "[1]"], "is no result of benchmarks.step"),
        (["--step-json", '{"environment": {"device": "AMD EPYC"}, "steps": []}'], "was measured on AMD EPYC"),
        (["--step-json", '{"environment": {"device": "NVIDIA A100"}, "steps": []}'], "holds no step of ours at 64"),
    ],
)
def test_what_cannot_be_calculated_is_refused(arguments, said, tmp_path, capsys):
    option, value = arguments
    if value[0] in "[{":
        (tmp_path / "step.json").write_text(value)
        value = str(tmp_path / "step.json")
    with pytest.raises(SystemExit) as ended:
        scaling.main([option, value])
    assert ended.value.code == 2 and said in capsys.readouterr().err
