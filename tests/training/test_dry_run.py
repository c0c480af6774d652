"""The dry run of every task: a batch of the largest shape that the recipe allows, one step, and what it takes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch

import albef_ds
from albef_ds.config import load_config
from albef_ds.data.batch import LabelledBatch, PairBatch, PretrainingBatch, QuestionBatch
from albef_ds.tasks.registry import TASKS
from albef_ds.training.dry_run import synthetic_batch
from tests.ranks import run_ranks
from tests.shapes_recipes import TRAINED, built, write_task_recipe
from tests.training_run import write_recipe

LOSSES = {
    "pretraining": ("itc", "itm", "mlm"),
    "retrieval": ("itc", "itm"),
    "grounding": ("itc", "itm"),
    "vqa": ("answers",),
    "entailment": ("classes",),
    "nlvr": ("classes",),
    "text_assignment": ("ta",),
}
BATCHES = {
    "pretraining": PretrainingBatch,
    "retrieval": PairBatch,
    "grounding": PairBatch,
    "vqa": QuestionBatch,
    "entailment": LabelledBatch,
    "nlvr": LabelledBatch,
    "text_assignment": PairBatch,
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("dry")
    made = {task: write_task_recipe(folder, task) for task in TRAINED}
    return made | {"pretraining": write_recipe(tmp_path_factory.mktemp("pretraining"))}


@pytest.mark.parametrize("task", TASKS)
def test_the_made_up_batch_is_the_largest_that_the_recipe_allows(recipes, task):
    config, tokenizer, _ = built(recipes[task], "data.max_tokens=9", "model.vision.image_size=16")
    batch = synthetic_batch(config, 5, tokenizer.mask_id, tokenizer.cls_id)
    assert type(batch) is BATCHES[task] and len(batch) == 5
    assert batch.images.shape == ((10 if task == "nlvr" else 5), 3, 16, 16)
    assert batch.text.cu_seqlens.tolist() == [0, 9, 18, 27, 36, 45]
    assert (batch.text.input_ids[::9] == tokenizer.cls_id).all()
    torch.manual_seed(0)
    network = TASKS[task](config.model)
    network.start_step(0.4)
    losses = network(batch)
    assert tuple(losses) == LOSSES[task] and all(torch.isfinite(value) for value in losses.values())


def dry_run_all(recipes: dict[str, str]) -> dict[str, str]:
    """In a process of its own: DeepSpeed's group is of the whole process."""
    from albef_ds.train import main

    printed = {}
    for task, recipe in recipes.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = main([recipe, "--dry-run"])
        printed[task] = f"{status}\n{out.getvalue()}"
    return printed


def test_every_task_says_what_it_takes(recipes):
    [printed] = run_ranks(1, dry_run_all, {task: str(recipe) for task, recipe in recipes.items()})
    for task, text in printed.items():
        assert text.startswith("0\n"), task
        for name in ("batch: ", "parameters: ", "model state: ", "peak memory: ", "GFLOP a sample"):
            assert name in text, (task, name)
        assert "losses " in text and all(f"{name} " in text.split("losses ")[1] for name in LOSSES[task]), task
        assert not (recipes[task].parent / f"run_{task}").exists(), task
    assert "0.0 M in the teacher" in printed["text_assignment"]


def test_all_recipes_that_ship_name_a_task_with_a_dry_run():
    shipped = sorted((Path(albef_ds.__file__).parent / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert load_config(path).task in BATCHES, path.name
