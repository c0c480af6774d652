"""Saving in the background, and disks that fail: what is complete stays so, and all ranks stop at the same step."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import threading
from pathlib import Path

import pytest
import torch

from albef_ds.training import checkpoint_writer
from albef_ds.training.checkpoint_files import disk_error, write_tensors
from albef_ds.training.checkpoint_manifest import MANIFEST, CheckpointError, config_hash, read_manifest, verify
from albef_ds.training.restore import MODEL_FILE
from tests.ranks import run_ranks
from tests.training.checkpointed import build, open_checkpoints, train_step


class Heard(logging.Handler):
    """What this rank logs."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("albef_ds").addHandler(self)
        logging.getLogger("albef_ds").setLevel(logging.INFO)

    def emit(self, record):
        self.lines.append(record.getMessage())


def scenario(folder: str) -> dict:
    """Everything that needs a running engine, on two ranks."""
    import torch.distributed as dist

    folder, engine, heard = Path(folder), build(), Heard()
    rank = dist.get_rank()
    found: dict = {"heard": heard.lines}

    # 1. Training goes on while the writer is held up.
    checkpoints = open_checkpoints(folder, keep=2, keep_every=2, retries=2)
    train_step(engine, 1)
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    held, write = threading.Event(), checkpoint_writer.write_tensors
    checkpoint_writer.write_tensors = lambda *args: held.wait(60) and write(*args)
    checkpoints.save(engine, 1)
    found["manifest while held"] = (folder / "step_00000001" / MANIFEST).exists()
    train_step(engine, 2)
    found["weights moved"] = not torch.equal(weights["model.temp"], engine.module.model.temp)
    threading.Timer(0.3, held.set).start()
    checkpoints.save(engine, 2)  # waits for the one before
    found["first when second begins"] = (folder / "step_00000001" / MANIFEST).exists()
    checkpoints.wait()
    checkpoint_writer.write_tensors = write
    if rank == 0:
        saved = torch.load(folder / "step_00000001" / MODEL_FILE, weights_only=True)["module"]
        found["as it was"] = all(torch.equal(saved[name], value) for name, value in weights.items())
    found["timings"] = [(t.step, t.blocked_s, t.write_s, t.bytes) for t in checkpoints.timings]
    checkpoints.save(engine, 2)  # a second time: nothing to do
    found["saves of a step"] = len(checkpoints.timings)

    # 2. Another rank's disk fails once: all try again.
    faults = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard.pt")] if rank == 1 else []

    def failing_once(*args):
        if faults:
            raise faults.pop()
        return write(*args)

    checkpoint_writer.write_tensors = failing_once
    train_step(engine, 3)
    checkpoints.save(engine, 3)
    checkpoints.wait()
    checkpoint_writer.write_tensors = write
    found["after one failure"] = sorted(p.name for p in folder.iterdir())

    # 3. The operating system refuses files beyond a few kilobytes, in the middle of writing, for good.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    checkpoints.save(engine, 4)
    found["stopped at"], found["message"] = run_until_stopped(checkpoints, 4)
    found["save says it too"] = message_of(lambda: checkpoints.save(engine, 5))
    found["after failures"] = sorted(p.name for p in folder.iterdir())

    # 4. The same, but the run is to go on.
    patient = open_checkpoints(folder, keep=2, on_error="continue", retries=1)
    patient.save(engine, 4)
    patient.wait()
    found["skipped"] = patient.skipped
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    patient.save(engine, 6)
    patient.finish()
    found["at last"] = sorted(p.name for p in folder.iterdir())

    # 5. Stop at once, without trying again; an output folder that is a file.
    (folder.parent / f"file{rank}").write_text("")
    dist.barrier()
    strict = open_checkpoints(folder.parent / "file0", on_error="stop", background=False)
    found["not a folder"] = message_of(lambda: strict.save(engine, 1))
    return found


def run_until_stopped(checkpoints, step: int) -> tuple[int, str]:
    from albef_ds.training.agreement import Agreement

    agreement = Agreement()
    for at in range(step, 2000):
        threading.Event().wait(0.002)
        if agreement.exchange(stop=False, saving_failed=checkpoints.failed).saving_failed:
            agreement.close()
            return at, message_of(checkpoints.give_up)
    return -1, "never stopped"


def message_of(action) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("saving") / "checkpoints"
    ranks = run_ranks(2, scenario, str(folder))
    ranks[0]["folder"] = folder
    return ranks


def test_training_goes_on_while_the_disk_is_slow_and_what_is_written_is_the_state_at_the_save(found):
    for rank in found:
        assert not rank["manifest while held"] and rank["weights moved"]
        assert rank["first when second begins"]
    assert found[0]["as it was"]


def test_a_save_says_how_long_training_waited_and_how_long_it_took(found):
    for rank in found:
        (first, blocked, took, size), (second, waited, _, _) = rank["timings"]
        assert (first, second) == (1, 2) and size > 0
        assert took > 0.25 and waited > 0.25 and blocked >= 0  # held up for 0.3 s, for which the second waited
        assert rank["saves of a step"] == 2
    assert any("checkpoint of step 1: written in" in line for line in found[0]["heard"])


def test_a_rank_whose_disk_fails_once_makes_all_write_again(found):
    assert found[0]["after one failure"] == ["step_00000002", "step_00000003"]
    assert any("No space left on device" in line and "(rank 1); attempt 1 of 3" in line for line in found[0]["heard"])


def test_a_disk_that_fails_for_good_stops_all_ranks_at_the_same_step_and_says_why(found):
    assert found[0]["stopped at"] == found[1]["stopped at"] > 4
    for rank in found:
        for message in (rank["message"], rank["save says it too"]):
            assert "step_00000004" in message and "File too large" in message and "GB free" in message
            assert "make room" in message
    assert found[0]["after failures"] == ["step_00000002", "step_00000003"]  # no half-written one is left


def test_with_continue_the_run_goes_on_without_that_checkpoint(found):
    assert [rank["skipped"] for rank in found] == [[4], [4]]
    assert any("training goes on without this checkpoint" in line for line in found[0]["heard"])
    assert found[0]["at last"] == ["step_00000003", "step_00000006"]
    for name in found[0]["at last"]:
        verify(found[0]["folder"] / name)


def test_an_output_folder_that_cannot_be_is_said_on_every_rank(found):
    for rank in found:
        assert "file0/step_00000001" in rank["not a folder"] and "GB free" in rank["not a folder"]


def test_the_manifest_says_what_was_saved_by_what(found):
    manifest = read_manifest(found[0]["folder"] / "step_00000006")
    assert (manifest.step, manifest.world_size, manifest.config) == (6, 2, {"name": "tiny"})
    assert manifest.config_sha256 == config_hash({"name": "tiny"})
    assert {"torch", "deepspeed", "albef_ds"} == manifest.versions.keys()
    text = json.loads((found[0]["folder"] / "step_00000006" / MANIFEST).read_text())
    assert text["files"][MODEL_FILE]["size"] == (found[0]["folder"] / "step_00000006" / MODEL_FILE).stat().st_size


def test_a_full_device_is_named_as_such():
    with pytest.raises(OSError) as error:
        write_tensors({"x": torch.zeros(100_000)}, Path("/dev/full"))
    assert error.value.errno == errno.ENOSPC
    assert "No space left on device" in disk_error(error.value, Path("/dev"))


def test_the_hash_is_of_what_stands_in_the_file(tmp_path):
    import hashlib

    path = tmp_path / "a.pt"
    entry = write_tensors({"x": torch.randn(70_001), "y": [1, "two"]}, path)
    assert entry.size == path.stat().st_size
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
