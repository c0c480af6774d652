"""Killed at any moment, a run goes on bit by bit: in real processes, with dropout, accumulation and a ragged queue."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from albef_ds.training.checkpoint_manifest import MANIFEST, CheckpointError, verify
from albef_ds.training.retention import ASIDE, complete_folders
from tests.training.test_resume_point import contents, set_schema
from tests.training_run import metrics, run_training, write_recipe

SAME = ("losses", "lr", "alpha", "temperature", "grad_norm")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    codes, output = run_training([str(write_recipe(folder))])
    assert codes == [0, 0], output
    return folder


def assert_equal_runs(undisturbed: Path, folder: Path) -> None:
    expected, found = metrics(undisturbed / "run"), metrics(folder / "run")
    assert sorted(found) == sorted(expected) == list(range(1, 14))
    for step, line in expected.items():
        assert {k: found[step][k] for k in SAME} == {k: line[k] for k in SAME}, f"step {step}"
    a, b = (torch.load(f / "run" / "albef.pth", weights_only=True)["model"] for f in (undisturbed, folder))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_killed_at_a_random_step_and_resumed_it_ends_bitwise_the_same(undisturbed, tmp_path):
    step, rank = random.randint(5, 13), random.randint(0, 1)
    recipe = str(write_recipe(tmp_path))
    codes, output = run_training([recipe], kill=("step", rank, step))
    assert codes[rank] == -signal.SIGKILL, output
    complete = complete_folders(tmp_path / "run" / "checkpoints")
    last_begun = (step - 1) // 4 * 4
    # The one that was being written in the background may be complete or not; the one before it always is.
    assert last_begun == 4 or f"step_{last_begun - 4:08d}" in [f.name for f in complete], (step, rank)
    codes, output = run_training([recipe])
    assert codes == [0, 0], output
    assert (f"resumed from {complete[0]}" if complete else "from step 0") in output, (step, rank)
    assert_equal_runs(undisturbed, tmp_path)


def test_killed_between_the_shards_and_the_manifest_the_previous_checkpoint_is_used(undisturbed, tmp_path):
    recipe = str(write_recipe(tmp_path))
    codes, output = run_training([recipe], kill=("manifest", 0, 8))
    assert codes[0] == -signal.SIGKILL, output
    unfinished = tmp_path / "run" / "checkpoints" / "step_00000008"
    assert (unfinished / "mp_rank_00_model_states.pt").exists() and not (unfinished / MANIFEST).exists()
    codes, output = run_training([recipe])
    assert codes == [0, 0], output
    assert "step_00000008: incomplete (no manifest): ignored" in output
    assert "checkpoints/step_00000004, after step 4" in output
    assert_equal_runs(undisturbed, tmp_path)


@pytest.fixture
def copy(undisturbed, tmp_path) -> Path:
    """The finished run with its last two checkpoints, to be damaged."""
    shutil.copytree(undisturbed, tmp_path / "copy")
    return tmp_path / "copy"


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted((folder / "run" / "checkpoints").glob("step_*"))


def test_the_last_checkpoints_are_kept_and_whole(undisturbed):
    folders = checkpoints_of(undisturbed)
    assert [f.name for f in folders] == ["step_00000012", "step_00000013"]
    for folder in folders:
        manifest = verify(folder)
        assert manifest.world_size == 2
        assert set(manifest.files) == {p.name for p in folder.iterdir()} - {MANIFEST}


# More kinds of damage, without a run: test_resume_point.py.
@pytest.mark.parametrize(
    "damage", ["one bit flipped", *(pytest.param(d, marks=pytest.mark.slow) for d in ("shortened", "missing", "cut"))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(copy, damage):
    newest = checkpoints_of(copy)[-1]
    shard = newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    contents = bytearray(shard.read_bytes())
    if damage == "shortened":
        shard.write_bytes(contents[:-100])
    elif damage == "one bit flipped":
        contents[len(contents) // 2] ^= 1
        shard.write_bytes(contents)
    elif damage == "missing":
        shard.unlink()
    else:
        manifest = newest / MANIFEST
        manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(CheckpointError, match=newest.name):
        verify(newest)
    arguments = [str(copy / "recipe.yaml"), f"output_dir={copy / 'run'}"]
    before = metrics(copy / "run")
    codes, output = run_training(arguments)
    assert codes == [0, 0], output
    assert newest.name in output and "trying the one before" in output
    assert "step_00000012, after step 12" in output
    assert metrics(copy / "run")[13]["losses"] == before[13]["losses"]


def test_another_model_and_other_data_are_refused(copy):
    recipe, before = str(copy / "recipe.yaml"), contents(copy / "run")
    here = f"output_dir={copy / 'run'}"
    codes, output = run_training([recipe, here, "model.embed_dim=8"])
    assert codes == [2, 2] and "another configuration: model.embed_dim was 16, is 8" in output
    annotations = copy / "fewer.json"
    annotations.write_text(json.dumps(json.loads((copy / "data" / "train.json").read_text())[:100]))
    root = f"data.image_root={copy / 'data'}"
    codes, output = run_training([recipe, here, f"data.train=[{annotations}]", root])
    assert codes == [2, 2] and "data.samples was 120, is 100" in output
    late = ["--resume", "none", "schedule.warmup_steps=500"]  # found when all is built and loaded
    codes, output = run_training([recipe, here, *late], ranks=1)
    assert codes == [2] and "warmup_steps (500) must be below" in output
    assert contents(copy / "run") == before


def test_where_no_checkpoint_can_be_used_nothing_is_touched_until_the_user_says_so(copy):
    """Two ranks with loader workers."""
    run = copy / "run"
    arguments = [str(copy / "recipe.yaml"), f"output_dir={run}", "data.workers=2", "data.loader=torch"]
    for checkpoint in checkpoints_of(copy):
        set_schema(checkpoint, 3)
    before = contents(run)
    codes, output = run_training([*arguments, "log.every=2"])
    assert codes == [2, 2], output
    assert output.count("does not start over unasked") == 1, output  # of two ranks
    assert output.count("written by a newer version") == 2 and "--resume none starts over" in output
    assert contents(run) == before

    codes, output = run_training([*arguments, "train.max_steps=4", "--resume", "none"])
    assert codes == [0, 0], output
    assert sorted(metrics(run)) == [1, 2, 3, 4]
    names = [f"{ASIDE}step_00000012", f"{ASIDE}step_00000013", "step_00000004"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == names
    assert sorted(p.name for p in run.glob("*summary.json")) == [f"{ASIDE}summary.json", "summary.json"]


def test_a_run_goes_on_with_another_number_of_ranks(copy):
    """24 samples a step: two ranks accumulate 2 micro-batches of 6, one rank 4."""
    codes, output = run_training(
        [str(copy / "recipe.yaml"), f"output_dir={copy / 'run'}", "train.max_steps=15"], ranks=1
    )
    assert codes == [0], output
    assert "written by 2 ranks, this run has 1" in output and "step_00000013, after step 13" in output
    found = metrics(copy / "run")
    assert sorted(found) == list(range(1, 16))
    manifest = verify(checkpoints_of(copy)[-1])
    assert (manifest.step, manifest.world_size) == (15, 1)


def test_a_malicious_checkpoint_is_not_executed(copy):
    """Somebody swaps a shard and even corrects the manifest."""
    import hashlib

    from tests.model.test_reference_weights import Bomb

    for folder in checkpoints_of(copy):
        states = folder / "mp_rank_00_model_states.pt"
        torch.save({"module": Bomb()}, states)
        manifest = json.loads((folder / MANIFEST).read_text())
        entry = {"size": states.stat().st_size, "sha256": hashlib.sha256(states.read_bytes()).hexdigest()}
        manifest["files"][states.name] = entry
        (folder / MANIFEST).write_text(json.dumps(manifest))
    codes, output = run_training([str(copy / "recipe.yaml"), f"output_dir={copy / 'run'}"])
    assert codes == [2, 2] and "holds what is neither tensor nor plain data" in output
    assert "executed" not in output.replace("nothing was executed", "")
