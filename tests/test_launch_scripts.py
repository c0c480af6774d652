"""The scripts of ds_configs/launch, with stand-ins for the commands of a cluster. no_ssh.sh: see test_two_hosts.py."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from albef_ds.train import deepspeed_folder

LAUNCH = deepspeed_folder() / "launch"


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def run(script: str, arguments: list[str], folder: Path, **settings: str) -> tuple[int, str]:
    """Its status, and what the stand-ins wrote into `said`."""
    env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SAID": str(folder / "said")}
    done = subprocess.run([LAUNCH / script, *arguments], env={**env, **settings}, capture_output=True, text=True)
    said = folder / "said"
    return done.returncode, (said.read_text() if said.exists() else "") + done.stderr


@pytest.fixture
def slurm(tmp_path) -> Path:
    """Two tasks, one after the other; srun's status is the higher of theirs, each $STATUS of what python would say."""
    stand_in(tmp_path, "scontrol", '[ $1 = show ] && printf "node7\\nnode8\\n" || echo "scontrol $*" >> "$SAID"')
    stand_in(tmp_path, "python", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR: $*" >> "$SAID"; eval "$DO"')
    tasks = 'for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; s=$?; [ $s -gt ${worst:-0} ] && worst=$s; done'
    options = 'while [[ $1 == --* ]]; do echo "srun $1" >> "$SAID"; shift; done'
    stand_in(tmp_path, "srun", f"{options}; {tasks}; exit ${{worst:-0}}")
    return tmp_path


SLURM = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_LOCALID": "0"}
SLURM |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}


@pytest.mark.parametrize(("status", "again"), [(0, False), (2, False), (69, False), (75, True), (137, False)])
def test_slurm_starts_the_ranks_and_requeues_those_that_were_asked_to_end(slurm, status, again):
    output = f"output_dir={slurm / 'a run'}"
    arguments = ["pretrain_14m", output, "data.train=[a b.json]"]
    code, said = run("slurm.sbatch", arguments, slurm, DO=f"exit {status}", **SLURM)
    assert code == status
    for rank in (0, 1):
        assert f"{rank} 0 2 node7: -m albef_ds.train {' '.join(arguments)}\n" in said
    assert "srun --kill-on-bad-exit=0" in said
    assert ("scontrol requeue 77" in said) is again


@pytest.mark.parametrize(("newer", "again"), [(False, False), (True, True)])
def test_slurm_requeues_a_run_that_lost_a_rank_if_it_got_further(slurm, newer, again):
    manifest = slurm / "run" / "checkpoints" / "step_00000100" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    os.utime(manifest, (time.time() - 3600,) * 2)
    do = f"sleep 0.1; {f'touch {manifest};' if newer else ''} exit 69"
    code, said = run("slurm.sbatch", ["r", f"output_dir={slurm / 'run'}"], slurm, DO=do, **SLURM)
    assert code == 69 and ("scontrol requeue 77" in said) is again


@pytest.mark.parametrize("script", ["no_ssh.sh", "pdsh.sh"])
def test_the_launcher_gets_hostfile_recipe_and_overrides_and_its_status_comes_back(tmp_path, script):
    stand_in(tmp_path, "deepspeed", 'echo "$*" >> "$SAID"; exit 75')
    code, said = run(script, ["hosts", "demo", "a.b=[x y]"], tmp_path, NODE="1", MASTER="node7", PORT="1234")
    assert code == 75 and said.startswith("--hostfile hosts ")
    assert said.endswith("--module albef_ds.train demo a.b=[x y]\n")
    if script == "no_ssh.sh":
        assert "--no_ssh --node_rank 1 --master_addr node7 --master_port 1234" in said


def test_what_is_not_said_is_asked_for(tmp_path):
    stand_in(tmp_path, "deepspeed", 'echo started >> "$SAID"')
    for settings in ({"NODE": "0"}, {"MASTER": "node7"}, {"NODE": "0", "MASTER": "node7"}):
        code, said = run("no_ssh.sh", [], tmp_path, **settings)
        assert code != 0 and "started" not in said
    assert "usage: NODE=0" in said


def test_torchrun_starts_nothing_again(tmp_path):
    stand_in(tmp_path, "torchrun", 'echo "$*" >> "$SAID"')
    code, said = run("torchrun.sh", ["demo"], tmp_path, NODES="2", NODE="1", MASTER="node7", GPUS="4")
    assert code == 0 and "--nnodes 2 --node-rank 1 --nproc-per-node 4 --max-restarts 0" in said
    assert said.endswith("--module albef_ds.train demo\n")
