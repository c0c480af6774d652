"""Copies of checkpoints behind URLs: whole or not there, and good enough to resume from."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
import torch

from albef_ds.training.checkpoint_files import write_tensors
from albef_ds.training.checkpoint_manifest import MANIFEST, CheckpointError, Manifest, verify
from albef_ds.training.retention import step_folder
from albef_ds.training.upload import Uploader, complete_remote, download_newest, open_remote
from tests.ranks import run_ranks
from tests.training.checkpointed import build, full_state, open_checkpoints, train_step


def make(folder: Path, step: int, size: int = 1000) -> Path:
    target = folder / step_folder(step)
    target.mkdir(parents=True)
    files = {f"{name}.pt": write_tensors({"x": torch.full((size,), step)}, target / f"{name}.pt") for name in "ab"}
    manifest = Manifest(schema=2, step=step, world_size=1, identity={}, versions={}, files=files)
    (target / MANIFEST).write_text(manifest.to_json())
    return target


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/remote/run"
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/run"


def uploader(url: str, keep: int = 2, keep_every: int | None = None, retries: int = 2) -> Uploader:
    return Uploader(url, keep, keep_every, retries, wait=0.01)


def remote_names(url: str) -> list[str]:
    return complete_remote(*open_remote(url))


def test_a_checkpoint_goes_there_and_comes_back_bitwise(url, tmp_path):
    folder = make(tmp_path / "here", 3)
    copies = uploader(url)
    copies.submit(folder)
    copies.finish()
    assert copies.busy == [] and remote_names(url) == ["step_00000003"]
    back, faults = download_newest(url, tmp_path / "there")
    assert faults == [] and back == tmp_path / "there" / "step_00000003" and verify(back) == verify(folder)
    assert all((back / name).read_bytes() == (folder / name).read_bytes() for name in ("a.pt", "b.pt", MANIFEST))


def test_the_same_rules_hold_there_as_here(url, tmp_path):
    copies = uploader(url, keep=1, keep_every=4)
    for step in (2, 4, 6, 8, 9):
        copies.submit(make(tmp_path / "here", step))
        copies.finish()
    assert remote_names(url) == [step_folder(step) for step in (9, 8, 4)]


def test_the_manifest_goes_last_and_a_failure_is_tried_again(url, tmp_path, monkeypatch):
    copies = uploader(url)
    put, order, faults = copies.files.put_file, [], [ConnectionError("no route"), TimeoutError("slow")]

    def failing(source, target, **kwargs):
        order.append(Path(source).name)
        if faults and order[-1] == "b.pt":
            raise faults.pop()
        put(source, target, **kwargs)

    monkeypatch.setattr(copies.files, "put_file", failing)
    copies.submit(make(tmp_path / "here", 1))
    copies.finish()
    assert order == ["a.pt", "b.pt", "a.pt", "b.pt", "a.pt", "b.pt", MANIFEST]
    assert remote_names(url) == ["step_00000001"] and copies.failed == []


def test_what_cannot_be_copied_is_said_and_the_next_one_still_goes(url, tmp_path, monkeypatch, caplog):
    copies = uploader(url, retries=1)
    put = copies.files.put_file
    monkeypatch.setattr(copies.files, "put_file", lambda *a, **k: (_ for _ in ()).throw(OSError("quota exceeded")))
    copies.submit(make(tmp_path / "here", 1))
    copies.finish()
    assert len(copies.failed) == 1 and "quota exceeded" in copies.failed[0] and "training goes on" in caplog.text
    assert remote_names(url) == []
    monkeypatch.setattr(copies.files, "put_file", put)
    copies.submit(make(tmp_path / "here", 2))
    copies.finish()
    assert remote_names(url) == ["step_00000002"]


def test_a_slow_server_holds_nobody_up_and_gets_the_newest(url, tmp_path, monkeypatch):
    copies, gate = uploader(url), threading.Event()
    put = copies.files.put_file
    monkeypatch.setattr(copies.files, "put_file", lambda *a, **k: gate.wait(30) and put(*a, **k))
    folders = [make(tmp_path / "here", step) for step in (1, 2, 3)]
    for folder in folders:
        copies.submit(folder)  # returns though the server has taken nothing yet
    assert folders[2] in copies.busy and set(copies.busy) <= set(folders)
    gate.set()
    copies.finish()
    assert "step_00000003" in remote_names(url)


def test_a_damaged_copy_is_passed_over_for_the_one_before(url, tmp_path, caplog):
    copies = uploader(url, keep=3)
    for step in (1, 2, 3):
        copies.submit(make(tmp_path / "here", step))
        copies.finish()
    files, path = open_remote(url)
    contents = bytearray(files.cat_file(f"{path}/step_00000003/a.pt"))
    contents[len(contents) // 2] ^= 1
    files.pipe_file(f"{path}/step_00000003/a.pt", bytes(contents))
    files.pipe_file(f"{path}/step_00000002/b.pt", bytes(10**6))
    found, faults = download_newest(url, tmp_path / "there")
    assert len(faults) == 2
    assert found.name == "step_00000001" and sorted(p.name for p in found.parent.iterdir()) == ["step_00000001"]
    assert "step_00000003/a.pt: contents have changed" in caplog.text
    assert "step_00000002/b.pt: " in caplog.text and "bytes instead of" in caplog.text


def test_a_stranger_s_manifest_cannot_write_outside(url, tmp_path):
    folder = make(tmp_path / "here", 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    files, path = open_remote(url)
    for number, name in enumerate(("../../escaped", "/tmp/escaped", "..")):
        manifest["files"] = {name: {"size": 7, "sha256": "0" * 64}}
        files.makedirs(f"{path}/step_0000000{number}", exist_ok=True)
        files.pipe_file(f"{path}/step_0000000{number}/{MANIFEST}", json.dumps(manifest).encode())
    found, faults = download_newest(url, tmp_path / "there" / "checkpoints")
    assert found is None and faults
    assert not list(tmp_path.rglob("escaped"))


def test_a_checkpoint_larger_than_the_disk_is_refused_before_it_is_fetched(url, tmp_path):
    folder = make(tmp_path / "here", 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["a.pt"]["size"] = 1 << 49
    files, path = open_remote(url)
    files.makedirs(f"{path}/step_00000001", exist_ok=True)
    files.pipe_file(f"{path}/step_00000001/{MANIFEST}", json.dumps(manifest).encode())
    found, (fault,) = download_newest(url, tmp_path / "there")
    assert found is None and "do not fit" in fault and "GB free" in fault


def test_nothing_there_is_no_error_and_an_unknown_protocol_is(url, tmp_path):
    assert download_newest(url, tmp_path) == (None, [])
    with pytest.raises(CheckpointError, match="nonsense://x"):
        Uploader("nonsense://x", 1, None, 0)


def one_rank(folder: str, url: str, steps: int) -> dict:
    engine = build()
    checkpoints = open_checkpoints(Path(folder), upload=url, keep=1)
    newest = checkpoints.newest()
    start = checkpoints.load(engine, newest) if newest else 0
    before = full_state(engine)
    for step in range(start + 1, steps + 1):
        train_step(engine, step)
        checkpoints.save(engine, step)
    checkpoints.finish()
    return {"start": start, "before": before, "after": full_state(engine)}


def test_a_run_whose_folder_is_lost_goes_on_from_its_copies(tmp_path):
    here, url = tmp_path / "checkpoints", f"file://{tmp_path}/remote"
    (first,) = run_ranks(1, one_rank, str(here), url, 2)
    assert remote_names(url)[0] == "step_00000002"
    shutil.rmtree(here)
    (second,) = run_ranks(1, one_rank, str(here), url, 2)
    assert (first["start"], second["start"]) == (0, 2)
    assert all(torch.equal(value, second["before"][name]) for name, value in first["after"].items())
