"""The comparison of fine-tuning with training from scratch, its runs replaced by what they leave behind."""

from __future__ import annotations

import json

import pytest

from albef_ds import downstream as module
from albef_ds.__main__ import main
from albef_ds.config import ConfigError
from albef_ds.data.shapes_world import write_shapes_world


def test_tasks_are_named_one_by_one_or_all():
    assert module.tasks_named("all") == ("retrieval", "vqa", "entailment", "nlvr", "grounding")
    assert module.tasks_named("nlvr, vqa") == ("nlvr", "vqa")
    with pytest.raises(ConfigError, match="captioning is none of retrieval, vqa"):
        module.tasks_named("vqa,captioning")


def test_without_a_demo_it_says_what_to_do(tmp_path, capsys):
    assert main(["downstream", "--demo", str(tmp_path / "none")]) == 2
    assert "run `make demo` first" in capsys.readouterr().err


def test_each_task_is_run_with_and_without_the_demos_weights(tmp_path, monkeypatch, capsys):
    demo = tmp_path / "demo"
    write_shapes_world(demo / "data", images=12, test_images=6, size=48)
    (demo / "albef.pth").write_bytes(b"")
    launched = []

    def launch(recipe, settings, ranks=None):
        values = dict(setting.split("=", 1) for setting in settings)
        launched.append((recipe, values))
        folder = tmp_path / "out" / values["output_dir"].rsplit("/", 1)[-1]
        folder.mkdir(parents=True, exist_ok=True)
        scores = {"entailment": {"accuracy": 80.0}, "nlvr": {"accuracy": 70.0}, "vqa": {"accuracy": 60.0}}
        (folder / "summary.json").write_text(json.dumps({"steps": 5, "seconds": 2.5, "samples_per_s": 9.0, **scores}))
        return 0

    monkeypatch.setattr(module, "launch", launch)
    arguments = ["downstream", "train.max_steps=5", "--demo", str(demo), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--tasks", "entailment,nlvr"]) == 0
    recipes = [recipe for recipe, _ in launched]
    assert recipes == ["shapes_entailment"] * 2 + ["shapes_text_assignment", "shapes_nlvr", "shapes_nlvr"]
    weights = [values.get("model.weights") for _, values in launched]
    assigned = str(tmp_path / "out" / "text_assignment" / "albef.pth")
    assert weights == [str(demo / "albef.pth"), None, str(demo / "albef.pth"), assigned, None]
    steps = [values.get("train.max_steps") for _, values in launched]
    assert steps == ["5", "5", None, "5", "5"]  # the preparation has its own
    rows = json.loads((tmp_path / "out" / "downstream.json").read_text())
    assert [(row["task"], row["start"], row["score"]) for row in rows] == [
        ("entailment", "pretrained", 80.0),
        ("entailment", "scratch", 80.0),
        ("nlvr", "pretrained", 70.0),
        ("nlvr", "scratch", 70.0),
    ]
    assert all(row["training_seconds"] == 2.5 for row in rows)
    assert "report" in capsys.readouterr().out and (tmp_path / "out" / "report.html").exists()
    launched.clear()
    assert main([*arguments, "--tasks", "vqa", "--no-scratch"]) == 0
    assert main([*arguments, "--tasks", "vqa", "--no-scratch", "--split", "val"]) == 0
    files = [
        [values[f"data.{key}"].rsplit("/", 1)[-1] for key in ("test", "test_annotations")] for _, values in launched
    ]
    assert files == [["vqa_test.json", "vqa_test_annotations.json"], ["vqa_val.json", "vqa_val_annotations.json"]]
