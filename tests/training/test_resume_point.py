"""A run that has been further does not start over unasked: whatever became of its checkpoints, it is said and kept."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from albef_ds.config import CheckpointConfig
from albef_ds.training.checkpoint_files import write_tensors
from albef_ds.training.checkpoint_manifest import MANIFEST, CheckpointError, Manifest
from albef_ds.training.resume_point import newest_or_refusal
from albef_ds.training.retention import ASIDE, set_summary_aside, step_folder
from albef_ds.training.stop import STOPPED, note_stopped
from albef_ds.training.upload import Uploader

EVERY = 4


def make(run: Path, *steps: int) -> list[Path]:
    """Checkpoints, complete."""
    made = []
    for step in steps:
        target = run / "checkpoints" / step_folder(step)
        target.mkdir(parents=True)
        files = {"a.pt": write_tensors({"x": torch.full((100,), step)}, target / "a.pt")}
        manifest = Manifest(schema=2, step=step, world_size=1, identity={}, versions={}, files=files)
        (target / MANIFEST).write_text(manifest.to_json())
        made.append(target)
    return made


def log_steps(run: Path, last: int) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, last + 1)))


def resume(run: Path, **settings) -> Path | None:
    return newest_or_refusal(run, CheckpointConfig(**{"every": EVERY, **settings}))


def contents(folder: Path) -> dict:
    """Of all files, with their times, and of all links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        else:
            found[path] = (path.is_file() and path.read_bytes(), path.is_file() and path.stat().st_mtime_ns)
    return found


def set_schema(checkpoint: Path, schema) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "schema": schema}))


def moved_and_linked(checkpoint: Path) -> None:
    shutil.move(checkpoint, checkpoint.parents[2] / checkpoint.name)
    checkpoint.symlink_to(checkpoint.parents[2] / checkpoint.name)


DAMAGE = {
    "other bytes": (lambda c: (c / "a.pt").write_bytes(bytes((c / "a.pt").stat().st_size)), "contents have changed"),
    "cut short": (lambda c: (c / "a.pt").write_bytes(b"a"), "1 bytes instead of"),
    "a file missing": (lambda c: (c / "a.pt").unlink(), "a.pt: missing"),
    "manifest of zeros": (lambda c: (c / MANIFEST).write_bytes(bytes(100)), "unreadable"),
    "manifest empty": (lambda c: (c / MANIFEST).write_text(""), "unreadable"),
    "newer": (
        lambda c: set_schema(c, 3),
        "by a newer version of albef_ds (schema 3, this version knows up to 2)",
    ),
    "no schema": (lambda c: set_schema(c, None), "not a manifest of schema 2"),
    "a link": (moved_and_linked, "links are not followed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_where_none_can_be_used_each_is_named_and_nothing_touched(tmp_path, damage):
    run = tmp_path / "run"
    hurt, said = DAMAGE[damage]
    for checkpoint in make(run, 4, 8):
        hurt(checkpoint)
    log_steps(run, 9)
    before = contents(run)
    with pytest.raises(CheckpointError) as refused:
        resume(run)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"{run / 'checkpoints'}: no checkpoint here can be used")
    assert sum(said in line for line in lines) == 2 and "step_00000004" in str(lines) and "step_00000008" in str(lines)
    assert lines[-1].startswith("Nothing was changed. --resume none starts over")
    assert contents(run) == before


@pytest.mark.parametrize("damage", set(DAMAGE) - {"a link"})
def test_where_the_one_before_can_be_used_it_is(tmp_path, damage, caplog):
    before, newest = make(tmp_path, 4, 8)
    DAMAGE[damage][0](newest)
    assert resume(tmp_path) == before
    assert DAMAGE[damage][1] in caplog.text and "trying the one before" in caplog.text


@pytest.mark.parametrize("kind", ["dangling link", "file"])
def test_a_folder_of_checkpoints_that_is_away_is_no_run_without_any(tmp_path, kind):
    """A scratch disk that is not mounted."""
    if kind == "file":
        (tmp_path / "checkpoints").write_text("")
    else:
        (tmp_path / "checkpoints").symlink_to("/nowhere/scratch")
    what = "not a folder" if kind == "file" else "a link to /nowhere/scratch, which is not there"
    with pytest.raises(CheckpointError, match=what):
        resume(tmp_path)


def test_a_linked_folder_of_checkpoints_is_followed(tmp_path):
    make(tmp_path / "disk", 4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    assert resume(tmp_path / "run") == tmp_path / "run" / "checkpoints" / step_folder(4)


# -- nothing whole is left ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [0, 1, EVERY, EVERY + 1, 2 * EVERY])
def test_a_run_killed_before_its_first_checkpoint_was_written_begins_again(tmp_path, killed_at):
    log_steps(tmp_path, killed_at)
    if killed_at >= EVERY:
        (make(tmp_path, EVERY)[0] / MANIFEST).unlink()
    assert resume(tmp_path) is None


@pytest.mark.parametrize("left", ["without manifests", "nothing"])
def test_a_run_that_must_have_had_one_is_refused(tmp_path, left):
    log_steps(tmp_path, 2 * EVERY + 1)
    for checkpoint in make(tmp_path, 4, 8) if left == "without manifests" else []:
        (checkpoint / MANIFEST).unlink()
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        resume(tmp_path)
    assert "goes to step 9, and there was to be a checkpoint every 4" in str(refused.value)
    assert str(refused.value).count("incomplete (no manifest)") == (2 if left == "without manifests" else 0)
    assert contents(tmp_path) == before


def test_how_often_it_saved_then_counts_and_not_how_often_it_is_to_save_now(tmp_path):
    log_steps(tmp_path, 9)
    (tmp_path / "config.yaml").write_text("checkpoint: {every: 5}")
    assert resume(tmp_path, every=1) is None
    (tmp_path / "config.yaml").write_text("checkpoint: {every: 4}")
    with pytest.raises(CheckpointError, match="every 4"):
        resume(tmp_path, every=1000)
    (tmp_path / "config.yaml").write_text("checkpoint: {never: 4}")
    assert resume(tmp_path, every=1000) is None


@pytest.mark.parametrize("trace", ["summary.json", STOPPED])
def test_a_run_that_has_ended_or_stopped_and_lost_its_checkpoints_is_refused(tmp_path, trace):
    if trace == STOPPED:
        note_stopped(tmp_path, 6, "SIGTERM")
    else:
        (tmp_path / trace).write_text(json.dumps({"steps": 3}))
    (tmp_path / "checkpoints" / f"{ASIDE}{step_folder(3)}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=trace) as refused:
        resume(tmp_path)
    assert f"{ASIDE}{step_folder(3)}: set aside when the run started over" in str(refused.value)
    (tmp_path / STOPPED).unlink(missing_ok=True)  # started over since, as the user asked
    set_summary_aside(tmp_path)
    assert resume(tmp_path) is None


def test_two_checkpoints_without_a_manifest_are_the_remains_of_a_whole_one(tmp_path):
    """The first is on the disk before the second is begun, and what a killed run leaves goes with the next save."""
    for checkpoint in make(tmp_path, 1, 2):
        (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"(?s)step_00000002: incomplete .*step_00000001: incomplete "):
        resume(tmp_path)


def test_a_run_that_goes_on_without_checkpoints_may_begin_again(tmp_path):
    log_steps(tmp_path, 100)
    assert resume(tmp_path, on_error="continue") is None


@pytest.mark.parametrize("summary", ["{}", '{"retrieval": {}}', "[]", "{", '{"steps": "many"}'])
def test_numbers_that_evaluate_has_left_are_no_run(tmp_path, summary):
    (tmp_path / "summary.json").write_text(summary)
    assert resume(tmp_path) is None


# -- copies elsewhere --------------------------------------------------------------------------------------------------


@pytest.fixture
def uploaded(tmp_path) -> tuple[Path, str]:
    run, url = tmp_path / "run", f"file://{tmp_path}/remote"
    copies = Uploader(url, keep=2, keep_every=None, retries=0)
    for checkpoint in make(run, 4, 8):
        copies.submit(checkpoint)
        copies.finish()
    return run, url


def test_a_damaged_run_goes_on_from_its_copy(uploaded):
    run, url = uploaded
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "a.pt").write_bytes(b"")
    assert resume(run, upload=url) == run / "checkpoints" / step_folder(8)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [step_folder(4), step_folder(8)]
    assert torch.load(run / "checkpoints" / step_folder(8) / "a.pt")["x"][0] == 8


def test_a_copy_takes_the_place_of_a_link_and_what_that_leads_to_stays(uploaded):
    run, url = uploaded
    shutil.rmtree(run / "checkpoints" / step_folder(4))
    moved_and_linked(run / "checkpoints" / step_folder(8))
    elsewhere = run.parent / step_folder(8)
    before = contents(elsewhere)
    found = resume(run, upload=url)
    assert found == run / "checkpoints" / step_folder(8) and not found.is_symlink()
    assert before and contents(elsewhere) == before


@pytest.mark.parametrize("here", ["damaged", "nothing"])
def test_where_the_copies_are_damaged_too_all_are_named_and_nothing_touched(uploaded, tmp_path, here):
    run, url = uploaded
    if here == "nothing":
        shutil.rmtree(run / "checkpoints")
    for file in tmp_path.rglob("a.pt"):
        file.write_bytes(b"")
    before = contents(run)
    with pytest.raises(CheckpointError) as refused:
        resume(run, upload=url)
    assert str(refused.value).count("step_0000000") == (4 if here == "damaged" else 2), refused.value
    assert {k: v for k, v in contents(run).items() if k.name != "checkpoints"} == {
        k: v for k, v in before.items() if k.name != "checkpoints"
    }
