"""A fine-tuning run on two real ranks that validates between epochs and evaluates its best weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from albef_ds.data.shapes_tasks import write_shapes_tasks
from albef_ds.data.shapes_world import ShapesWorld
from albef_ds.evaluate import main as evaluate
from albef_ds.model.weight_files import read_state_dict
from albef_ds.training.json_lines import read_lines
from tests.training_run import run_training, write_recipe


def entailment_recipe(folder: Path) -> Path:
    path = write_recipe(folder)
    tasks = write_shapes_tasks(folder / "tasks", ShapesWorld.at(folder / "data"))
    recipe = yaml.safe_load(path.read_text())
    recipe["task"] = "entailment"
    recipe["data"] |= {
        "train": [str(tasks.entailment_train)],
        "val": str(tasks.entailment_test),
        "test": str(tasks.entailment_test),
        "image_root": str(folder / "data"),
    }
    recipe["train"] = {"epochs": 3, "global_batch": 48, "micro_batch": 12, "deepspeed": "zero2_cpu"}
    recipe["evaluation"] = {"every": 1, "batch": 7}
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    codes, output = run_training([str(entailment_recipe(folder))])
    assert codes == [0, 0], output
    return folder / "run"


def test_every_epoch_is_validated_and_the_best_weights_are_kept(run):
    history = read_lines(run / "validation.jsonl")
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert [line["step"] for line in history] == [steps // 3, 2 * steps // 3, steps]
    scores = [line["score"] for line in history]
    assert all(line["metrics"]["accuracy"] == line["score"] for line in history)
    best = json.loads((run / "summary.json").read_text())["validation"]
    assert best["score"] == max(scores) and best["best_step"] == history[scores.index(max(scores))]["step"]
    assert read_state_dict(run / "best.pth").keys() == read_state_dict(run / "albef.pth").keys()


def test_the_test_set_is_judged_with_the_best_weights_as_one_process_judges_them(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    # Here val and test are the same file.
    assert summary["entailment"]["accuracy"] == summary["validation"]["score"]
    recipe = run.parent / "recipe.yaml"
    assert evaluate([str(recipe), str(run / "best.pth"), "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["entailment"] == summary["entailment"]
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == json.loads(
        (run / "results.json").read_text()
    )


def test_a_run_that_goes_on_forgets_what_was_found_after_its_checkpoint(run):
    from albef_ds.training.validation import Validation

    before = read_lines(run / "validation.jsonl")
    validation = Validation(run, 1, lambda: None, dict, start_step=before[0]["step"])  # rank 1 writes nothing
    assert validation.history == before[:1] and read_lines(run / "validation.jsonl") == before
