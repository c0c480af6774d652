"""Faults whose tests take longer; `make test-reliability` runs them, continuous integration does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from albef_ds.training.checkpoint_manifest import MANIFEST
from albef_ds.training.rendezvous import free_port
from albef_ds.training.spikes import ROLLBACKS
from albef_ds.training.stop import EXIT_REQUEUE, STOPPED
from albef_ds.training.watchdog import EXIT_RANK_LOST
from tests.reliability.processes import ROOT, environment, run_faulty
from tests.reliability.test_faults import QUICK, assert_equal_runs
from tests.training_run import write_recipe

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("fault", "lost"), [("kill", 0), ("stop", 1)])
def test_either_rank_may_be_lost(tmp_path, fault, lost):
    recipe = str(write_recipe(tmp_path))
    fault = {"do": fault, "rank": lost, "step": 3}
    ended = run_faulty([fault], [recipe, *QUICK], tmp_path, wait_for=(1 - lost,))
    assert ended.codes[1 - lost] == EXIT_RANK_LOST, ended
    assert f"rank {1 - lost} ends: rank {lost} (" in ended.outputs[1 - lost], ended


def test_of_three_ranks_the_one_that_is_lost_is_named(tmp_path):
    recipe = str(write_recipe(tmp_path))
    ended = run_faulty(
        [{"do": "kill", "rank": 2, "step": 3}], [recipe, "train.micro_batch=8", *QUICK], tmp_path, ranks=3
    )
    assert ended.codes[2] == -signal.SIGKILL and EXIT_RANK_LOST in ended.codes[:2], ended
    assert "ends: rank 2 (" in ended.outputs[0] + ended.outputs[1], ended


def test_a_rank_that_ends_with_an_error_is_quoted_by_the_other(tmp_path):
    recipe = str(write_recipe(tmp_path))
    ended = run_faulty([{"do": "raise", "rank": 1, "step": 3}], [recipe, *QUICK], tmp_path)
    assert ended.codes == [EXIT_RANK_LOST, 1], ended
    assert "has ended: LookupError: put in by the test" in ended.outputs[0], ended


@pytest.mark.parametrize(
    ("phase", "named"), [("waiting for its batch", "rank 1 stands"), ("computing", "every rank stands")]
)
def test_a_rank_that_hangs_ends_the_run_with_its_name_and_every_stack(tmp_path, phase, named):
    """While it computes, the others wait for it in the same place: the stacks alone tell them apart."""
    recipe = str(write_recipe(tmp_path))
    hang = {"do": "hang", "rank": 1, "step": 3, "phase": phase}
    ended = run_faulty([hang], [recipe, "faults.dead_seconds=5", "faults.timeout_minutes=0.2"], tmp_path)
    assert EXIT_RANK_LOST in ended.codes and 0 not in ended.codes and None not in ended.codes, ended
    said = "\n".join(ended.outputs)
    assert f"{named} still at step 3, {phase}" in said, ended
    assert "Current thread" in said and "faulty.py" in said


def test_a_second_signal_ends_at_once(tmp_path):
    recipe = str(write_recipe(tmp_path))
    ended = run_faulty([{"do": "term_again", "rank": 1, "step": 3}], [recipe, *QUICK], tmp_path)
    assert ended.codes == [EXIT_RANK_LOST, 128 + signal.SIGTERM], ended


@pytest.mark.parametrize(("receiver", "status"), [("launcher", 1), ("rank", EXIT_REQUEUE)])
def test_through_the_deepspeed_launcher(tmp_path, receiver, status):
    """The launcher passes SIGTERM on to one rank after the other, loader workers included; its own status is then 1."""
    recipe = write_recipe(tmp_path, train={"max_steps": 20000}, data={"workers": 1}, checkpoint={"every": 20000})
    bin_folder = Path(sys.executable).parent
    env = {k: v for k, v in environment(0, 2, 0).items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"
    command = [bin_folder / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["--module", "albef_ds.train", str(recipe)]
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
    written = tmp_path / "run" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 300
        while not (written.exists() and written.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        launcher = next(c for c in children if "deepspeed.launcher.launch" in c.cmdline())
        ranks = [c for c in launcher.children() if "albef_ds.train" in c.cmdline()]
        (launcher if receiver == "launcher" else ranks[1]).send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == status, (tmp_path / "output.txt").read_text()
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
    stopped = json.loads((tmp_path / "run" / STOPPED).read_text())
    assert stopped["status"] == EXIT_REQUEUE
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped['step']:08d}" / MANIFEST).exists()


def test_after_a_spike_the_run_is_bitwise_one_that_never_had_its_samples(tmp_path):
    spiky, clean = tmp_path / "spiky", tmp_path / "clean"
    sections = {"faults": {"rollback": True, "rollback_window": 8, "rollback_steps": 2, "rollback_threshold": 20.0}}
    # One epoch only: later the samples of the spike would come again. Dull losses: nothing else spikes.
    sections["train"] = {"max_steps": 18, "global_batch": 4, "micro_batch": 2}
    sections["optimizer"] = {"lr": 1e-6}
    sections["schedule"] = {"name": "constant", "warmup_steps": 0}
    for folder in (spiky, clean):
        folder.mkdir()
        write_recipe(folder, **sections)
    spike = {"do": "spike", "step": 11, "until": 12}
    ended = run_faulty([spike], [str(spiky / "recipe.yaml")], spiky)
    assert ended.codes == [0, 0], ended
    (rollback,) = json.loads((spiky / "run" / ROLLBACKS).read_text())
    assert rollback == {"steps": [11, 12], "back_to": "step_00000008", "passed_over": [10, 11]}
    (clean / "run").mkdir()
    (clean / "run" / ROLLBACKS).write_text(json.dumps([rollback]))
    assert run_faulty([], [str(clean / "recipe.yaml")], clean).codes == [0, 0]
    assert_equal_runs(clean, spiky, 18)
