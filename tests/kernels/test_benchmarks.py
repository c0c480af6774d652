"""The benchmarks of the kernels run, count right, and a suite goes on when a lane does not."""

import json
import sys

import pytest
import torch

from benchmarks import kernels, measure, suite


def test_counts_of_the_papers_size():
    """21.5 GFLOP and, in bf16, 134 MB for B = 64, M = 65,536, D = 256."""
    flops, traffic = kernels.cost(64, 65536, 256, True, 2)
    assert flops == pytest.approx(21.5e9, rel=0.01) and traffic == pytest.approx(134e6, rel=0.01)
    flops, traffic = kernels.cost(64, 65536, 256, False, 2)
    assert flops == pytest.approx(8.6e9, rel=0.01) and traffic == pytest.approx(67e6, rel=0.01)


def test_a_small_benchmark_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e11)
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--batches", "4", "--lengths", "64", "--seconds", "0.01"]
    assert kernels.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "The Triton kernels are not measured here" in captured.err
    assert {row["contender"] for row in result["loss"]} == {"eager fp32", "ours torch fp32"}
    assert {row["pass"] for row in result["loss"]} == {"forward", "forward + backward"}
    assert all(row["ms"] > 0 and row["peak MB"] is None for row in result["loss"])
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md", "kernels.png"}
    assert "not measured" in (tmp_path / "kernels.md").read_text()


def test_a_rival_that_fails_is_a_row_of_its_own(monkeypatch):
    def broken(problem, with_grad):
        raise RuntimeError("out of memory")

    contenders = kernels.kernel_rivals.losses(torch.device("cpu"))
    monkeypatch.setattr(kernels.kernel_rivals, "losses", lambda device: contenders | {"rival": broken})
    limits = {"copy bytes/s": 1e10, "fp32 FLOP/s": 1e11}
    rows = kernels.bench_losses(torch.device("cpu"), [4], [32], 16, 0.01, limits, lambda line: None)
    assert [row["error"] for row in rows if row["contender"] == "rival"] == ["RuntimeError: out of memory"] * 2
    assert sum("ms" in row for row in rows) == 4


def test_interleaved_times_and_their_ratio():
    work = torch.randn(200, 200)
    calls = {"once": lambda: work @ work, "ten": lambda: [work @ work for _ in range(10)]}
    samples = measure.interleaved(calls, torch.device("cpu"), seconds=0.2)
    assert len(samples["once"]) == len(samples["ten"]) >= 5
    found = measure.ratio(samples["ten"], samples["once"])
    assert found["low"] <= found["median"] <= found["high"] and found["median"] > 2
    assert measure.summary([3.0, 1.0, 2.0])["median"] == 2.0


def test_the_environment_says_where(device):
    found = measure.environment(device)
    assert (
        found["device"]
        and found["commit"]
        and found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )
    assert json.dumps(found)


def test_a_suite_goes_on_after_lanes_that_fail_hang_or_do_not_exist(tmp_path, monkeypatch):
    code = ("-c", "print('{}')")
    chosen = [
        suite.Lane("good", code, 1, "json"),
        suite.Lane("bad", ("-c", "import sys; print('half', file=sys.stderr); sys.exit(3)"), 1, "json"),
        suite.Lane("hangs", ("-c", "import time; time.sleep(60)"), 0.03, "json"),
        suite.Lane("future", code, 1, "albef_ds_no_such_module"),
        suite.Lane("last", code, 1, "json"),
    ]
    rows = suite.run(chosen, tmp_path, minutes=1, say=lambda line: None)
    assert [row["status"] for row in rows] == ["passed", "failed", "timed out", "not there yet", "passed"]
    assert rows[0]["json"] == {} and "half" in rows[1]["error"]
    page = suite.markdown(measure.environment(torch.device("cpu")), rows)
    assert "## hangs: timed out" in page and "| bad | failed |" in page
    rows = suite.run(chosen, tmp_path, minutes=0, say=lambda line: None)
    assert {row["status"] for row in rows} == {"no time left"}
    monkeypatch.setattr(suite, "lanes", lambda kind: chosen[:2])
    assert suite.main(["--out", str(tmp_path / "all"), "--device", "cpu"]) == 1
    assert json.loads((tmp_path / "all" / "suite.json").read_text())["lanes"][1]["status"] == "failed"
    assert sys.executable not in (tmp_path / "all" / "suite.md").read_text()


def test_lanes_in_order_of_worth():
    assert suite.lanes("cuda")[0].name == "kernel tests"
    assert all("cpu" in lane.on for lane in suite.lanes("cpu"))
