"""python -m albef_ds checkpoint …, over checkpoints of several tasks made without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from albef_ds.__main__ import main
from albef_ds.model.weight_files import read_state_dict
from albef_ds.tasks.registry import task_class
from albef_ds.training.checkpoint_files import write_tensors
from albef_ds.training.checkpoint_manifest import MANIFEST, Manifest, read_manifest
from albef_ds.training.restore import MODEL_FILE
from albef_ds.training.retention import step_folder
from tests.tiny import tiny_model


def make(run: Path, step: int, task: str = "pretraining", **changes):
    """A complete checkpoint; returns the task whose weights it holds."""
    torch.manual_seed(step)
    module = task_class(task)(tiny_model(**changes))
    folder = run / "checkpoints" / step_folder(step)
    folder.mkdir(parents=True)
    files = {MODEL_FILE: write_tensors({"module": module.state_dict()}, folder / MODEL_FILE)}
    identity = {"task": task, "model": tiny_model(**changes).model_dump(mode="json")}
    manifest = Manifest(schema=2, step=step, world_size=2, identity=identity, versions={}, files=files)
    (folder / MANIFEST).write_text(manifest.to_json())
    return module


def damage(run: Path, step: int) -> Path:
    path = run / "checkpoints" / step_folder(step) / MODEL_FILE
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_takes_the_newest_and_its_weights_are_the_task_s(tmp_path, capsys, suffix):
    make(tmp_path, 1)
    task = make(tmp_path, 12)
    out = tmp_path / "out" / f"albef{suffix}"
    assert main(["checkpoint", "export", str(tmp_path), str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    state = read_state_dict(out)
    assert torch.equal(state["vision_proj.weight"], task.model.vision_proj.weight)
    assert state["image_queue"].shape == (12, 37) and any(k.startswith("visual_encoder_m.") for k in state)
    assert all(v.dtype == torch.float32 for v in state.values() if v.is_floating_point())


@pytest.mark.parametrize("task", ["pretraining", "retrieval", "entailment"])
def test_export_without_the_teacher_and_of_tasks_that_have_no_queue(tmp_path, task):
    make(tmp_path, 1, task)
    folder = tmp_path / "checkpoints" / step_folder(1)
    for path in (folder, tmp_path / "checkpoints", tmp_path):
        assert main(["checkpoint", "export", str(path), str(tmp_path / "a.pth"), "--without-teacher"]) == 0
    state = read_state_dict(tmp_path / "a.pth")
    assert state and not any(k.split(".")[0].endswith("_m") or "queue" in k for k in state)


def test_export_of_a_damaged_or_strange_checkpoint_says_so(tmp_path, capsys):
    make(tmp_path, 1)
    path = damage(tmp_path, 1)
    assert main(["checkpoint", "export", str(tmp_path), str(tmp_path / "a.pth")]) == 2
    assert f"{path}: contents have changed" in capsys.readouterr().err
    other = tmp_path / "other"
    make(other, 1)
    manifest = read_manifest(other / "checkpoints" / step_folder(1))
    changed = manifest.model_copy(update={"identity": {**manifest.identity, "task": "unknown"}})
    (other / "checkpoints" / step_folder(1) / MANIFEST).write_text(changed.to_json())
    assert main(["checkpoint", "export", str(other), str(tmp_path / "a.pth")]) == 2
    assert "no checkpoint of a model that this version knows" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(tmp_path / "nowhere"), str(tmp_path / "a.pth")]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err


def test_list_shows_each_with_its_state(tmp_path, capsys):
    make(tmp_path, 1)
    make(tmp_path, 2)
    (tmp_path / "checkpoints" / step_folder(2) / MODEL_FILE).write_bytes(b"short")
    (tmp_path / "checkpoints" / step_folder(3)).mkdir()
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    head, first, second, third = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "step" and first.split()[0] == "1" and first.endswith("complete")
    assert "5 bytes instead of" in second and "manifest.json is missing" in third


def test_verify_names_what_is_damaged_and_fails(tmp_path, capsys):
    make(tmp_path, 1)
    make(tmp_path, 2)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("as written") == 2
    path = damage(tmp_path, 2)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert f"{path}: contents have changed" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "checkpoints" / step_folder(1))]) == 0


def test_prune_asks_first_and_keeps_the_newest(tmp_path, capsys):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / step_folder(4)).rename(folder / f"set_aside_{step_folder(4)}")
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-every", "2"]) == 0
    assert "nothing has been removed" in capsys.readouterr().out and len(list(folder.iterdir())) == 4
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-every", "2", "--yes"]) == 0
    assert sorted(p.name for p in folder.iterdir()) == [step_folder(2), step_folder(3)]
    assert main(["checkpoint", "prune", str(tmp_path), "--keep", "0"]) == 2


def test_prune_removes_nothing_while_the_newest_is_damaged(tmp_path, capsys):
    make(tmp_path, 1)
    make(tmp_path, 2)
    damage(tmp_path, 2)
    assert main(["checkpoint", "prune", str(tmp_path), "--yes"]) == 2
    assert "contents have changed" in capsys.readouterr().err
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
