"""Every process of a run ends, whichever died first, loader workers too. Through the launcher: test_kills.py.

That nothing is left of a run, `run_faulty` and `started` look after each.
"""

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

from albef_ds.training.watchdog import EXIT_RANK_LOST
from tests.reliability.processes import ROOT, run_faulty, until
from tests.reliability.test_faults import QUICK
from tests.training_run import write_recipe


def test_a_worker_that_is_killed_ends_the_run_with_one_message_a_rank(tmp_path):
    recipe = str(write_recipe(tmp_path, train={"max_steps": 400}))
    ended = run_faulty([{"do": "kill_worker", "rank": 1, "step": 3}], [recipe, "faults.dead_seconds=3"], tmp_path)
    assert ended.codes == [EXIT_RANK_LOST, EXIT_RANK_LOST], ended
    assert "rank 1 ends: DataLoader worker (pid" in ended.outputs[1], ended  # torch: killed, or exited
    assert "lower data.workers" in ended.outputs[1]
    assert "rank 0 ends: rank 1 (" in ended.outputs[0] and "WorkerLostError" in ended.outputs[0], ended
    assert "Traceback" not in "".join(ended.outputs), ended


@pytest.mark.slow
def test_a_rank_that_meets_an_error_ends_and_its_workers_with_it(tmp_path):
    """They keep SIGTERM blocked, and Python would wait for them for ever."""
    recipe = str(write_recipe(tmp_path, train={"micro_batch": 12, "max_steps": 400}))
    began = time.monotonic()
    ended = run_faulty([{"do": "raise", "rank": 0, "step": 3}], [recipe, *QUICK], tmp_path, ranks=1)
    assert ended.codes == [1] and "LookupError: put in by the test" in ended.outputs[0], ended
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_what_a_worker_finds_wrong_with_the_data_is_one_sentence(tmp_path):
    recipe = write_recipe(tmp_path, train={"micro_batch": 12})
    for image in (tmp_path / "data" / "images").iterdir():
        image.write_bytes(b"none")
    ended = run_faulty([], [str(recipe)], tmp_path, ranks=1)
    assert ended.codes == [2], ended
    said = [line for line in ended.outputs[0].splitlines() if line.startswith("albef_ds: ")]
    assert len(said) == 1 and said[0].startswith("albef_ds: images cannot be read: 21 drawn"), ended
    assert "Traceback" not in ended.outputs[0]


# -- launchers ---------------------------------------------------------------------------------------------------------

LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print("rank", rank.pid, flush=True)
time.sleep(120)
"""
RANK = """
import os, time
from albef_ds.training import stop
stop.LOOK_SECONDS = 0.05
with stop.StopSignals() as signals{holding}:
    print("here", flush=True)
    while signals.received is None and not os.path.exists("go"):
        time.sleep(0.01)
    print("saving", signals.received, flush=True)
    {then}
"""
SAVES, NEVER_SAVES = "open('saved', 'w').close()", "time.sleep(60)"


class Launched:
    """A process in the form of a launcher's, and the one that it has started; both end with the context."""

    def __init__(self, folder: Path, script: str, rank: str, **environ: str):
        (folder / script).write_text(LAUNCHER)
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
        command, self.log = [sys.executable, str(folder / script), rank], folder / "log.txt"
        with open(self.log, "w") as log:
            self.launcher = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT)
        self.says("rank ")
        self.rank = int(self.log.read_text().split("rank ")[1].split()[0])

    def says(self, text: str) -> None:
        assert until(lambda: text in self.log.read_text(), 60), self.log.read_text()

    def kill_launcher(self) -> None:
        self.launcher.kill()
        self.launcher.wait()

    def ends(self) -> bool:
        return until(lambda: not is_there(self.rank), 10)

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *exception) -> None:
        self.kill_launcher()
        if is_there(self.rank):
            os.kill(self.rank, signal.SIGKILL)


def is_there(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("does", ["saves", "never saves", "is built"])
def test_a_rank_whose_launcher_is_killed_saves_and_ends(tmp_path, does):
    holding = "" if does == "is built" else ", signals.holding(patience=0.5)"
    rank = RANK.format(holding=holding, then=SAVES if does == "saves" else NEVER_SAVES)
    with Launched(tmp_path, "deepspeed", rank) as run:
        run.says("here")
        run.kill_launcher()
        assert run.ends(), run.log.read_text()
        said = run.log.read_text()
    assert (tmp_path / "saved").exists() == (does == "saves")
    assert f"its launcher (process {run.launcher.pid}) is gone" in said, said
    assert ("saving launcher" in said) == (does != "is built"), said
    assert ("0.5 s later (faults.dead_seconds) it had not ended" in said) == (does == "never saves"), said


def test_a_rank_whose_launcher_was_killed_before_it_looked_ends(tmp_path):
    """DeepSpeed's launcher tells its ranks so by their environment."""
    late = "import os, time\nstarted_by = os.getppid()\nprint('begun', flush=True)\n"
    late += "while os.getppid() == started_by:\n    time.sleep(0.01)\n"
    rank = late + RANK.format(holding="", then="")
    with Launched(tmp_path, "deepspeed", rank, CROSS_RANK="0", CROSS_SIZE="1", LOCAL_SIZE="1") as run:
        run.says("begun")
        run.kill_launcher()
        assert run.ends(), run.log.read_text()
        assert "the launcher that started it is gone" in run.log.read_text()


def test_a_run_outlives_a_parent_that_is_no_launcher(tmp_path):
    """`nohup python -m albef_ds.train … &` in a shell that is then closed."""
    with Launched(tmp_path, "train_all.py", RANK.format(holding="", then="")) as run:
        run.says("here")
        run.kill_launcher()
        time.sleep(0.5)  # ten looks
        assert is_there(run.rank)
        (tmp_path / "go").touch()
        assert run.ends()
        assert "gone" not in run.log.read_text()


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ("python -u -m deepspeed.launcher.launch --world_info=x --module albef_ds.train r.yaml", True),
        ("/usr/bin/python3.12 -W ignore -X dev -m deepspeed.launcher.runner --module albef_ds.train r.yaml", True),
        ("/v/bin/python /v/bin/deepspeed --module albef_ds.train r.yaml", True),
        ("/v/bin/python /v/bin/torchrun --nproc_per_node 2 -m albef_ds.train r.yaml", True),
        ("python -m torch.distributed.run -m albef_ds.train r.yaml", True),
        ("python -m albef_ds demo train.max_steps=4", True),
        ("python -m albef_ds downstream", True),
        ("python -m albef_ds.train deepspeed", False),
        ("python -m albef_ds report deepspeed", False),
        ("python train.py deepspeed", False),
        ("bash -c deepspeed", False),
        ("/bin/sh launch/pdsh.sh", False),
        ("slurmstepd: [12.0]", False),
        ("", False),
    ],
)
def test_which_commands_are_launchers(command, launches):
    from albef_ds.processes import _is_launcher

    assert _is_launcher(command.split()) == launches


# -- what else could hold a process up ---------------------------------------------------------------------------------


def test_a_process_that_has_ended_and_does_not_go_is_ended():
    code = (
        "import threading, time; from albef_ds.training.ending import end_soon; end_soon(3, 0.5); "
        "threading.Thread(target=time.sleep, args=(600,)).start()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3
    assert "still there 0.5 s after its end: ended, status 3" in ended.stderr


PACKS = """
import json, multiprocessing, pathlib, sys, threading, time
from albef_ds.data import packing

def tell():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)

if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    list(packing._each_done(pathlib.Path(sys.argv[1]), [0, 1], workers=2))
"""


def test_the_workers_of_a_packing_end_with_it(tmp_path):
    (tmp_path / ".packing").mkdir()
    os.mkfifo(tmp_path / ".packing" / "identity.json")  # what they read first: they wait there for ever
    script = tmp_path / "packs.py"
    script.write_text(PACKS)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    packing = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environ, stdout=subprocess.PIPE)
    workers = json.loads(packing.stdout.readline())
    assert len(workers) == 2
    time.sleep(1)  # for them to begin
    packing.kill()
    packing.wait()
    assert until(lambda: not any(is_there(worker) for worker in workers), 5)
