"""A recipe's evaluation as a whole: the same to the last bit on one rank and on two, with what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from albef_ds.data.annotations import AnnotationError
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.recipe import evaluate_recipe
from albef_ds.evaluation.samples import evaluating
from tests.ranks import run_ranks
from tests.shapes_recipes import EVALUATED, built, write_task_recipe, write_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for task in EVALUATED:
        write_task_recipe(folder, task)
    return folder


def evaluate(folder: Path, task: str, out: Path | None = None, *overrides: str, file: str | None = None):
    config, tokenizer, model = built(folder / f"{task}.yaml", *overrides)
    return evaluate_recipe(model, config, tokenizer, CPU, file, out)


# Of the sets' 24 samples: batches of 5 (3 and 2 a rank), and one batch, which leaves the second rank without any.
SETTINGS = [[task, f"evaluation.batch={size}"] for task in EVALUATED for size in (5, 64)]
SETTINGS += [["vqa", "data.answer_list=null"], ["grounding", "evaluation.heatmap=itc"]]


def evaluate_all(folder: Path, out: Path) -> list[tuple]:
    found = []
    for number, (task, *overrides) in enumerate(SETTINGS):
        place = out / str(number)
        place.mkdir(exist_ok=True)
        result = evaluate(folder, task, place, *overrides)
        found.append((result.name, result.metrics, result.score, result.examples))
    return found


def on_a_rank(folder: Path, out: Path, holed: str) -> tuple[list[tuple], str]:
    torch.distributed.init_process_group("gloo")
    found = evaluate_all(folder, out)
    try:
        evaluate(folder, "entailment", file=holed)
    except EvaluationError as error:
        return found, str(error)
    return found, "no error"


@pytest.fixture(scope="module")
def holed(folder) -> str:
    """A test set with an image that is not there, in the second batch: the first rank's of two."""
    _, tasks = write_world(folder)
    entries = json.loads(tasks.entailment_test.read_text())
    entries[7]["image"] = "gone"
    file = folder / "holed.json"
    file.write_text(json.dumps(entries))
    return str(file)


@pytest.fixture(scope="module")
def two_ranks(folder, holed) -> list[tuple[list[tuple], str]]:
    (folder / "two").mkdir()
    return run_ranks(2, on_a_rank, folder, folder / "two", holed)


def test_two_ranks_find_what_one_finds_to_the_last_bit(folder, two_ranks, tmp_path):
    alone = evaluate_all(folder, tmp_path)
    (first, _), (second, _) = two_ranks
    for setting, expected, *found in zip(SETTINGS, alone, first, second, strict=True):
        assert found[0] == expected and found[1] == expected, setting
    one, two = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*.json")} for out in (tmp_path, folder / "two")
    )
    assert one == two
    assert len(one) == 7  # retrieval and grounding write numbers alone


def test_an_unusable_image_is_named_on_all_ranks(folder, holed, two_ranks):
    with pytest.raises(
        EvaluationError, match="test images that cannot be used: gone.jpg: the file does not exist"
    ) as e:
        evaluate(folder, "entailment", file=holed)
    assert [error for _, error in two_ranks] == [str(e.value)] * 2


@pytest.mark.parametrize("task", ["vqa", "entailment", "nlvr", "grounding"])
def test_an_unusable_entry_stops_the_evaluation_and_is_named(folder, task, tmp_path):
    _, tasks = write_world(folder)
    entries = json.loads(getattr(tasks, f"{task}_test").read_text())
    file = tmp_path / "test.json"
    file.write_text(json.dumps([*entries, {"image": "a.jpg"}]))
    with pytest.raises(
        EvaluationError, match=f"1 entries of the test set cannot be used: .*test.json, entry {len(entries)}: "
    ):
        evaluate(folder, task, file=str(file))


def test_without_a_test_set_or_for_a_task_without_evaluation_it_says_so(folder, tmp_path):
    with pytest.raises(EvaluationError, match="data.test is empty"):
        evaluate(folder, "nlvr", None, "data.test=null")
    recipe = write_task_recipe(tmp_path, "text_assignment")
    with pytest.raises(EvaluationError, match="text_assignment has no evaluation of its own"):
        evaluate(recipe.parent, "text_assignment", None, "data.test=x.json")
    with pytest.raises(AnnotationError, match="nowhere.json"):
        evaluate(folder, "nlvr", None, "data.test=nowhere.json")


@pytest.mark.parametrize("task", EVALUATED)
def test_the_score_is_the_number_by_which_the_best_weights_are_chosen(folder, task):
    result = evaluate(folder, task)
    found = {
        "retrieval": lambda m: m["itm"]["mean"],
        "vqa": lambda m: m["accuracy"],
        "entailment": lambda m: m["accuracy"],
        "nlvr": lambda m: m["accuracy"],
        "grounding": lambda m: m["all"]["ranked"],
    }[task](result.metrics)
    assert result.name == task and result.score == found and 0 <= found <= 100


def test_evaluation_leaves_the_model_in_its_mode_also_after_an_error():
    model = torch.nn.Dropout(0.5)
    for training in (True, False):
        model.train(training)
        with pytest.raises(ZeroDivisionError), evaluating(model, CPU):
            assert not model.training and not torch.is_grad_enabled()
            _ = 1 / 0
        assert model.training is training and torch.is_grad_enabled()
