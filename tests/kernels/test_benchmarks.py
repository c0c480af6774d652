"""The benchmarks of the kernels run and count right."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import kernel_pages, kernel_rivals, kernels, measure

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--dim", "16", "--batches", "4", "64", "--lengths", "64", "1024"]
CHILD = """
import sys
from benchmarks import kernels, measure
measure.copy_bandwidth = measure.matmul_rate = lambda *_: 1e11
kernels.main(sys.argv[1:])
"""


@pytest.fixture
def known_limits(monkeypatch):
    """Not measured, which takes a second and a half."""
    monkeypatch.setattr(measure, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 1e11)


def test_counts_of_the_papers_size():
    """21.5 GFLOP and, in bf16, 134 MB for B = 64, M = 65,536, D = 256."""
    flops, traffic = kernels.cost(64, 65536, 256, True, 2)
    assert flops == pytest.approx(21.5e9, rel=0.01) and traffic == pytest.approx(134e6, rel=0.01)
    flops, traffic = kernels.cost(64, 65536, 256, False, 2)
    assert flops == pytest.approx(8.6e9, rel=0.01) and traffic == pytest.approx(67e6, rel=0.01)


def test_a_small_benchmark_on_the_cpu(tmp_path, known_limits, capsys):
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--batches", "4", "--lengths", "64", "--seconds", "0.01"]
    assert kernels.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "The Triton kernels are not measured here" in captured.err
    assert {row["contender"] for row in result["loss"]} == {"eager fp32", "ours torch fp32"}
    assert {row["pass"] for row in result["loss"]} == {"forward", "forward + backward"}
    assert all(row["ms"] > 0 < row["host ms"] and row["peak MB"] is None for row in result["loss"])
    assert {path.suffix for path in tmp_path.glob("kernels.*")} == {".jsonl", ".json", ".md", ".png"}
    assert kernel_pages.result_of(measure.read_rows(tmp_path / "kernels.jsonl")) == result
    assert result["not measured"] == []
    assert "not measured" in (tmp_path / "kernels.md").read_text()


def test_a_rival_that_fails_is_a_row_of_its_own(monkeypatch):
    def broken(problem, with_grad):
        raise RuntimeError("out of memory")

    contenders = kernel_rivals.losses(CPU)
    monkeypatch.setattr(kernel_rivals, "losses", lambda device: contenders | {"rival": broken})
    limits = {"copy bytes/s": 1e10, "fp32 FLOP/s": 1e11}
    rows = kernels.time_losses(kernels.Job(4, 32, True), 16, CPU, 0.01, limits)
    assert [row["error"] for row in rows if row["contender"] == "rival"] == ["RuntimeError: out of memory"]
    assert sum("ms" in row for row in rows) == 2


def test_a_problem_that_fails_is_a_row_and_not_the_end(known_limits, monkeypatch):
    def broken(*args):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(kernel_rivals, "Problem", broken)
    result = kernels.run(CPU, [4], [32], 16, 0.01)
    assert [row["error"] for row in result["loss"]] == ["OutOfMemoryError: too large"] * 2
    assert len(result["sampler"]) == 2 and not result["not measured"]
    assert "all failed: OutOfMemoryError" in kernels.markdown(result)


def test_the_shapes_of_training_come_first():
    planned = kernels.jobs(kernels.BATCHES, kernels.LENGTHS)
    assert planned[:3] == [kernels.Job(64, 65536, True), kernels.Job(64, 65536, False), kernels.Job(64)]
    assert len(set(planned)) == len(planned) == 2 * 6 * 4 + 6
    assert kernels.jobs([1], [0])


def test_what_there_was_no_time_for_is_named(known_limits, capsys):
    assert kernels.main([*SMALL, "--seconds", "0.01", "--minutes", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss"] == result["sampler"] == [] and len(result["not measured"]) == 2 * 4 + 2
    assert "- loss B=64 M=1024 forward + backward" in kernels.markdown(result)


def test_sigterm_leaves_pages_of_what_was_measured(tmp_path, known_limits, monkeypatch):
    before, timed = signal.getsignal(signal.SIGTERM), []

    def some(job, *args):
        timed.append(job)
        if len(timed) == 3:
            signal.raise_signal(signal.SIGTERM)
        return time_losses(job, *args)

    time_losses = kernels.time_losses
    monkeypatch.setattr(kernels, "time_losses", some)
    with pytest.raises(SystemExit, match="143"):
        kernels.main([*SMALL, "--seconds", "0.01", "--out", str(tmp_path)])
    assert signal.getsignal(signal.SIGTERM) == before
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["job"] for row in result["loss"]} == {job.head["job"] for job in timed[:2]}
    assert timed[2].head["job"] in result["not measured"]
    assert "## Not measured" in (tmp_path / "kernels.md").read_text()


def test_a_killed_benchmark_leaves_its_rows(tmp_path):
    command = [sys.executable, "-c", CHILD, *SMALL, "--seconds", "0.1", "--out", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=measure.ROOT) as child:
        told = next(line for line in child.stderr if line.startswith("loss"))
        time.sleep(random.random() * 0.4)
        child.kill()
        child.stderr.read()
    result = kernel_pages.result_of(measure.read_rows(tmp_path / "kernels.jsonl"))
    assert any(told.startswith(row["job"]) for row in result["loss"])
    assert len({row["job"] for row in result["loss"] + result["sampler"]}) + len(result["not measured"]) == 2 * 4 + 2
    assert not (tmp_path / "kernels.json").exists() and kernels.markdown(result)


def test_every_shape_of_the_compiled_rival_is_compiled():
    """PyTorch gives up on a function after eight shapes and says nothing."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    build = kernel_rivals.eager(torch.float32, backend=backend)
    for batch, with_grad in itertools.product(range(2, 11), (True, False)):
        call = build(kernel_rivals.Problem(batch, 3, 4, CPU), with_grad)
        call()
        assert compiled, (batch, with_grad)
        compiled.clear()
        call()
        assert not compiled, "compiled again within what is timed"


def test_no_loop_of_multinomial_where_it_would_fail():
    """On a GPU that failure would end CUDA for the whole benchmark."""
    assert "loop of multinomial().item()" in kernel_rivals.samplers(torch.zeros(2, 2))
    assert list(kernel_rivals.samplers(torch.zeros(1, 1))) == ["ours torch"]


def test_interleaved_times_and_their_ratio():
    work = torch.randn(200, 200)
    calls = {"once": lambda: work @ work, "ten": lambda: [work @ work for _ in range(10)]}
    samples = measure.interleaved(calls, CPU, seconds=0.2)
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
