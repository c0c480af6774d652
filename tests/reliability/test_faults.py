"""Faults put into real training processes: the README's table of promises. The slower ones: test_slow.py."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from albef_ds.training.bad_steps import DUMP
from albef_ds.training.checkpoint_files import read_tensors
from albef_ds.training.stop import EXIT_REQUEUE, STOPPED
from albef_ds.training.watchdog import EXIT_RANK_LOST
from tests.reliability.processes import run_faulty
from tests.training_run import metrics, write_recipe

SAME = ("losses", "lr", "alpha", "temperature", "grad_norm")
QUICK = ("faults.dead_seconds=5", "faults.timeout_minutes=3")


def assert_equal_runs(expected: Path, found: Path, steps: int) -> None:
    a, b = metrics(expected / "run"), metrics(found / "run")
    assert sorted(a) == sorted(b) == list(range(1, steps + 1))
    for step in a:
        assert {k: b[step][k] for k in SAME} == {k: a[step][k] for k in SAME}, f"step {step}"
    ours, theirs = (torch.load(f / "run" / "albef.pth", weights_only=True)["model"] for f in (expected, found))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(("fault", "lost", "loader"), [("kill", 1, "torch"), ("stop", 0, "auto")])
def test_a_rank_that_is_lost_ends_the_other_and_is_named(tmp_path, fault, lost, loader):
    other = 1 - lost
    recipe = str(write_recipe(tmp_path))
    fault = {"do": fault, "rank": lost, "step": 3}
    ended = run_faulty([fault], [recipe, *QUICK], tmp_path, wait_for=(other,), loader=loader)
    assert ended.codes[other] == EXIT_RANK_LOST, ended
    assert f"albef_ds: rank {other} ends: rank {lost} (" in ended.outputs[other], ended
    assert "is lost" in ended.outputs[other]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = [str(write_recipe(folder)), "train.deterministic=true"]
    ended = run_faulty([{"do": "report", "step": 1}], arguments, folder, workers=0)  # they change no batch
    assert ended.codes == [0, 0], ended
    for output in ended.outputs:
        settings = json.loads(next(line for line in output.splitlines() if line.startswith("settings"))[9:])
        assert settings == {"deterministic": True, "cudnn": True, "workspace": ":4096:8"}
    return folder


def test_asked_to_end_it_saves_says_so_and_goes_on_bitwise_and_deterministic_runs_are_equal(undisturbed, tmp_path):
    arguments = [str(write_recipe(tmp_path)), "train.deterministic=true"]
    ended = run_faulty([{"do": "usr1", "rank": 1, "step": 5}], arguments, tmp_path)
    assert ended.codes == [EXIT_REQUEUE, EXIT_REQUEUE], ended
    assert "SIGUSR1: saving after the next step" in ended.outputs[1]
    stopped = json.loads((tmp_path / "run" / STOPPED).read_text())
    assert stopped == {"step": 6, "signal": None, "status": EXIT_REQUEUE}  # rank 0 did not get it
    assert sorted(metrics(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    ended = run_faulty([], arguments, tmp_path)
    assert ended.codes == [0, 0], ended
    assert "step_00000006, after step 6" in ended.outputs[0]
    assert not (tmp_path / "run" / STOPPED).exists()
    assert_equal_runs(undisturbed, tmp_path, 13)


def tensors_of(value, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {k: v for name, item in items for k, v in tensors_of(item, f"{prefix}/{name}").items()}


def differing(run: Path, first: int, second: int) -> set[str]:
    """Names of the tensors in which two checkpoints differ, of all but the random number generators."""
    one, other = (run / "checkpoints" / f"step_{step:08d}" for step in (first, second))
    found = set()
    for path in one.glob("*_states.pt"):
        a, b = tensors_of(read_tensors(path)), tensors_of(read_tensors(other / path.name))
        assert a and a.keys() == b.keys()
        found |= {name for name in a if not torch.equal(a[name], b[name])}
    return found


def test_steps_that_are_not_finite_on_one_rank_are_skipped_by_all_and_too_many_stop_the_run(tmp_path):
    faults = [
        {"do": "nan", "rank": 1, "step": 3},
        {"do": "nan_constant", "rank": 1, "step": 4},
        {"do": "nan_grad", "rank": 1, "step": 7, "until": 9},
    ]
    recipe = str(write_recipe(tmp_path, checkpoint={"every": 1, "keep": 20}, log={"keys": True}))
    ended = run_faulty(faults, [recipe, "faults.max_bad_steps=3"], tmp_path)
    assert ended.codes == [2, 2], ended
    run = tmp_path / "run"
    assert [line["skipped"] for _, line in sorted(metrics(run).items())] == [0, 0, 1, 1, 0, 0, 1, 1, 1]
    # The teacher takes step 2's weights at the beginning of step 3, and then nothing moves.
    moved = differing(run, 2, 3)
    assert moved and all("teacher" in name for name in moved), moved
    assert differing(run, 3, 4) == set()
    assert any("queue" in name for name in differing(run, 4, 5))

    last_good = run / "checkpoints" / "step_00000008"
    for output in ended.outputs:
        assert "3 steps in a row (7 to 9)" in output and str(run / DUMP) in output and str(last_good) in output
    dump = json.loads((run / DUMP).read_text())
    assert dump["last_checkpoint"] == str(last_good)
    assert [entry["step"] for entry in dump["steps"]] == [7, 8, 9]
    keys = [json.loads(line) for line in (run / "keys_rank_00001.jsonl").read_text().splitlines()]
    for entry in dump["steps"]:
        sound, broken = entry["ranks"]
        assert [m["keys"] for m in broken] == [line["keys"] for line in keys if line["step"] == entry["step"]]
        if entry["step"] > 7:
            assert all(0 < norm < 1e6 for m in sound for norm in m["grad_norms"].values())
            assert all(m["grad_norms"]["text_encoder"] == "nan" for m in broken)


def test_a_signal_outside_the_loop_ends_at_once_and_worker_processes_never_see_one():
    """Run here in a process of its own: the signals are real."""
    import os
    import time

    from albef_ds.training.stop import StopSignals, signals_blocked

    def status_of(scene) -> int:
        child = os.fork()
        if child == 0:
            scene()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def early() -> None:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(10)

    def twice() -> None:
        with StopSignals() as signals, signals.holding(patience=60):
            os.kill(os.getpid(), signal.SIGTERM)
            while signals.received is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    def with_worker() -> None:
        with StopSignals(), signals_blocked():
            worker = os.fork()
            if worker == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(3)  # reached
            os._exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))

    assert status_of(early) == EXIT_REQUEUE
    assert status_of(twice) == 128 + signal.SIGTERM
    assert status_of(with_worker) == 3
