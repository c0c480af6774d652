"""`albef_ds.evaluate` from the command line's arguments to the folder it writes."""

from __future__ import annotations

import json

import pytest
import torch

from albef_ds.evaluate import main
from albef_ds.evaluation.recipe import evaluate_recipe
from albef_ds.model.reference_weights import to_reference
from tests.shapes_recipes import EVALUATED, built, write_task_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes, and weights in the reference's form, of every task."""
    folder = tmp_path_factory.mktemp("evaluate")
    for task in EVALUATED:
        recipe = write_task_recipe(folder, task)
        _, _, model = built(recipe, seed=1)
        torch.save({"model": to_reference(model)}, folder / f"{task}.pth")
    return folder


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("task", EVALUATED)
def test_the_numbers_the_answers_and_the_report(folder, task, tmp_path, capsys):
    recipe, weights, out = folder / f"{task}.yaml", folder / f"{task}.pth", tmp_path / "new" / "out"
    status, printed, _ = run(capsys, recipe, weights, "evaluation.batch=7", "--out", out)
    assert status == 0, printed
    config, tokenizer, model = built(recipe, "evaluation.batch=7", seed=1)
    expected = evaluate_recipe(model, config, tokenizer, torch.device("cpu"))
    numbers, _, report = printed.partition("\nreport: ")
    assert json.loads(numbers) == json.loads(json.dumps(expected.metrics))
    assert json.loads((out / "summary.json").read_text()) == {task: json.loads(numbers)}
    assert (out / "results.json").is_file() is (task in ("vqa", "entailment", "nlvr"))
    assert (out / "config.yaml").read_text().startswith(f"task: {task}\n")
    assert (out / "report.html").is_file() and "report.html" in report


def test_without_a_folder_nothing_is_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed, _ = run(capsys, folder / "nlvr.yaml", folder / "nlvr.pth")
    assert status == 0 and json.loads(printed)["sentences"] == 24
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("nlvr", ["{folder}/nowhere.pth"], "nowhere.pth: no such weights file"),
        ("nlvr", ["{folder}/vqa.yaml"], "vqa.yaml: not a file of plain tensors"),
        ("vqa", ["{folder}/vqa.pth", "model.vision.layers=3"], "not a checkpoint of this model"),
        ("nlvr", ["{folder}/nlvr.pth", "data.test=null"], "data.test is empty"),
        ("nlvr", ["{folder}/nlvr.pth", "data.test=nowhere.json"], "nowhere.json cannot be read"),
        ("nlvr", ["{folder}/nlvr.pth", "data.tset=x"], "did you mean 'data.test'"),
        ("nlvr", ["{folder}/nlvr.pth", "data.image_root=/nowhere"], "test images that cannot be used"),
        ("vqa", ["{folder}/vqa.pth", "data.test_annotations=nowhere.json"], "nowhere.json: no such file"),
        ("vqa", ["{folder}/vqa.pth", "data.answer_list=nowhere.json"], "nowhere.json cannot be read"),
        (
            "vqa",
            ["{folder}/vqa.pth", "data.answer_list={folder}/empty.json"],
            "empty.json: the list of answers is empty",
        ),
        ("grounding", ["{folder}/grounding.pth", "evaluation.heatmap_layer=0"], "layer 0 has no cross-attention"),
        (
            "grounding",
            ["{folder}/grounding.pth", "evaluation.heatmap=itc", "evaluation.heatmap_layer=2"],
            "block 2: the image encoder has blocks 0 to 1",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_clear_message(folder, task, arguments, message, capsys):
    (folder / "empty.json").write_text("[]")
    status, printed, error = run(capsys, folder / f"{task}.yaml", *[a.format(folder=folder) for a in arguments])
    assert status == 2 and not printed
    said = [line for line in error.splitlines() if not line.startswith("DeepSpeed ")]  # what it has built
    assert message in error and said[0].startswith("albef_ds: ") and "Traceback" not in error


def test_the_package_command_gives_the_same(folder, capsys):
    from albef_ds.__main__ import main as package_main

    _, alone, _ = run(capsys, folder / "nlvr.yaml", folder / "nlvr.pth")
    assert package_main(["evaluate", str(folder / "nlvr.yaml"), str(folder / "nlvr.pth")]) == 0
    assert capsys.readouterr().out == alone
