"""Every process of a run through the deepspeed launcher is killed once, at every stage: nothing is left of it.

Two ranks with two loader workers each. "start": the ranks have met, and are built; "evaluation": between two epochs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from albef_ds.training.rendezvous import free_port
from tests.reliability.processes import MARK, ROOT, assert_none_left, environment, marked, run_faulty, started, until
from tests.training_run import metrics, write_recipe

pytestmark = pytest.mark.slow

DEAD_SECONDS = 5
PROMISED = DEAD_SECONDS + 10  # seconds: "faults.dead_seconds and a little", on a machine of two cores
VICTIMS, STAGES = ("runner", "launch", "rank 0", "rank 1", "worker"), ("start", "training", "evaluation")
# Workers start with the first batch.
KILLS = [(victim, stage) for victim in VICTIMS for stage in STAGES if (victim, stage) != ("worker", "start")]


def command_of(folder: Path, stage: str) -> list[str]:
    """The launcher's; evaluation goes on for ever."""
    recipe = write_recipe(folder, train={"max_steps": 4000}, checkpoint={"every": 50})
    faults = [{"do": "evaluate_on"}] if stage == "evaluation" else []
    settings = ["data.workers=2", "data.loader=torch", f"faults.dead_seconds={DEAD_SECONDS}"]
    if stage == "evaluation":
        settings += [f"data.val={folder / 'data' / 'test.json'}", "evaluation.every=1", "evaluation.k_test=4"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"]
    launcher += ["--master_port", str(free_port()), "--module", "tests.reliability.faulty"]
    return [*launcher, json.dumps(faults), str(recipe), *settings]


def reached(stage: str, folder: Path) -> bool:
    said = (folder / "output.txt").read_text(errors="replace")
    if stage == "start":
        return "DeepSpeed configuration" in said
    return ("evaluating" if stage == "evaluation" else "step 5/") in said


def victim_of(name: str, run: subprocess.Popen) -> psutil.Process:
    if name == "runner":
        return psutil.Process(run.pid)
    below = psutil.Process(run.pid).children(recursive=True)
    launch = next(p for p in below if "deepspeed.launcher.launch" in p.cmdline())
    if name == "launch":
        return launch
    ranks = {p.environ()["RANK"]: p for p in launch.children() if "tests.reliability.faulty" in p.cmdline()}
    return ranks["1"].children()[0] if name == "worker" else ranks[name.split()[1]]


@pytest.mark.parametrize(("victim", "stage"), KILLS)
def test_whoever_is_killed_nothing_is_left(tmp_path, victim, stage):
    mark = uuid.uuid4().hex
    environ = {k: v for k, v in environment(0, 2, 0).items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    with open(tmp_path / "output.txt", "w") as output:
        command, options = command_of(tmp_path, stage), {"stdout": output, "stderr": subprocess.STDOUT}
        run = subprocess.Popen(command, cwd=ROOT, env={**environ, MARK: mark}, **options)
    try:
        assert until(lambda: reached(stage, tmp_path) or run.poll() is not None, 120)
        assert run.poll() is None, (tmp_path / "output.txt").read_text()
        victim_of(victim, run).send_signal(signal.SIGKILL)
        began = time.monotonic()
        until(lambda: run.poll() is not None and not marked(mark), PROMISED)
        took = time.monotonic() - began
        left = [f"{p.pid} {p.cmdline()}" for p in marked(mark)]
    finally:
        for process in marked(mark):
            process.kill()
        run.wait()
    output = (tmp_path / "output.txt").read_text(errors="replace")
    print(f"{victim} killed at {stage}: {took:.1f} s")
    assert not left, (left, output)
    if victim.startswith("rank") or victim == "worker":
        assert run.returncode != 0, output
        other = 1 - int(victim[-1]) if victim.startswith("rank") else 0
        assert f"albef_ds: rank {other} ends: rank {1 - other} (" in output or "Killing subprocess" in output, output
    if victim == "worker":
        assert "rank 1 ends: DataLoader worker (pid" in output and "Traceback" not in output, output
    if victim in ("runner", "launch"):
        assert "is gone" in output, output
        if stage == "training":  # and what it had done is saved
            assert (tmp_path / "run" / "stopped.json").exists(), output


def test_an_orphan_owns_its_folder_until_it_has_ended(tmp_path):
    """The launcher is killed, its ranks are stopped in the middle of a step, and the command is started again."""
    recipe = str(write_recipe(tmp_path, train={"max_steps": 12}))
    settings = [recipe, "data.workers=2", "data.loader=torch"]
    with started([{"do": "stop", "step": 3}], settings, tmp_path, tag="orphan") as orphan:
        rank = psutil.Process(orphan.processes[0].pid)
        assert until(lambda: rank.status() == psutil.STATUS_STOPPED, 120), orphan.outputs
        ended = run_faulty([], [recipe], tmp_path)
        assert ended.codes == [2, 2], ended
        assert f"is in use by process {rank.pid} on " in ended.outputs[0] + ended.outputs[1], ended
    ended = run_faulty([], [recipe], tmp_path)
    assert ended.codes == [0, 0] and sorted(metrics(tmp_path / "run")) == list(range(1, 13)), ended
    assert_none_left(orphan.mark)
