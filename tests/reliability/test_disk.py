"""Disks that fail under real training: full, or read-only, from the start or from some moment on.

A file system in memory stands for the disk, in a mount namespace of its own. Needs root; skipped elsewhere. What needs
no such thing is in ../training/test_checkpoint_saving.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from albef_ds.training.checkpoint_manifest import verify
from albef_ds.training.rendezvous import free_port
from albef_ds.training.retention import complete_folders, step_of
from tests.reliability.processes import ROOT, environment
from tests.training_run import metrics, write_recipe

pytestmark = pytest.mark.slow

LAST = 120  # steps; a checkpoint every 4


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("a disk that fails is made with unshare (util-linux), which is not here")
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"mount namespaces cannot be made here (root is needed): {tried.stderr.strip()}")


def train(folder: Path, fault: str, *settings: str) -> tuple[int, str, list[Path]]:
    """Exit status, output, and the complete checkpoints that are left, newest first."""
    recipe = write_recipe(folder, train={"max_steps": LAST, "micro_batch": 12}, checkpoint={"every": 4, "keep": 2})
    checkpoints = folder / "run" / "checkpoints"
    command = [sys.executable, "-m", "tests.reliability.mounted", str(checkpoints), fault, str(recipe), *settings]
    env = environment(0, 1, free_port())
    ended = subprocess.run(
        ["unshare", "--mount", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    output = (folder / "run" / "output.txt").read_text()
    return ended.returncode, f"{output}\n{ended.stderr}", complete_folders(folder / "run" / "checkpoints_kept")


@pytest.mark.parametrize("fault, error", [("readonly", "Read-only file system"), ("full", "No space left on device")])
def test_a_disk_that_fails_for_good_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, fault, error):
    status, output, complete = train(tmp_path, fault, "checkpoint.retries=1")
    assert status == 2, output
    assert error in output and "GB free" in output and "attempt 1 of 2" in output and "make room" in output
    assert "Traceback" not in output
    assert complete and all(verify(folder).step == step_of(folder.name) for folder in complete), output
    assert max(metrics(tmp_path / "run")) < LAST


@pytest.mark.parametrize("fault", ["readonly", "full"])
def test_with_continue_training_ends_without_the_checkpoints_that_failed(tmp_path, fault):
    status, output, complete = train(tmp_path, fault, "checkpoint.on_error=continue", "checkpoint.retries=0")
    assert status == 0, output
    assert "training goes on without this checkpoint" in output
    assert complete and verify(complete[0]).step < LAST
    assert max(metrics(tmp_path / "run")) == LAST and (tmp_path / "run" / "albef.pth").exists()


def test_once_there_is_room_again_the_save_that_failed_is_made(tmp_path):
    status, output, complete = train(tmp_path, "full_once")
    assert status == 0, output
    assert "No space left on device" in output and "attempt 1 of" in output
    assert verify(complete[0]).step == LAST


def test_a_folder_that_was_never_writable_is_said_at_the_first_save(tmp_path):
    status, output, complete = train(tmp_path, "never", "checkpoint.on_error=stop")
    assert status == 2 and not complete, output
    assert "step_00000004: Read-only file system" in output and "Traceback" not in output
