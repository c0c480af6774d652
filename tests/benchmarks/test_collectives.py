"""The count of collectives is one of the recorded numbers: it must not depend on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import collectives, measure

PLAIN = "from benchmarks import collectives; collectives.main([])"
ON_A_GPU = f"from benchmarks import fake_gpu; fake_gpu.install(); {PLAIN}"


def counted(program: str) -> dict:
    """What the command prints, on a machine where nobody has told DeepSpeed what to run on."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=measure.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_machine_with_a_gpu_counts_what_one_without_counts():
    found = counted(ON_A_GPU)
    assert found == counted(PLAIN)
    assert found["accelerator"] == "cpu"
    assert found["collectives a step"] == sum(found["collectives"].values()) > 0


def test_a_process_that_has_chosen_a_gpu_is_refused(monkeypatch):
    from deepspeed.accelerator import real_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    monkeypatch.setattr(real_accelerator, "ds_accelerator", CUDA_Accelerator())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(RuntimeError, match="DeepSpeed has chosen cuda before"):
        collectives.count(8, "tiny", {})
