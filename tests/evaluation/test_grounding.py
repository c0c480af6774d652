"""Heat maps of a whole test set against true boxes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from albef_ds.data.augment import EvalTransform
from albef_ds.data.task_entries import ReferringEntry, read_entries, referring
from albef_ds.data.task_samples import TaskSamples, stacked, texts_of
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.grounding import Grounded, examples_of, ground_all, score
from albef_ds.evaluation.heatmaps import itc_heatmaps, itm_heatmaps
from albef_ds.evaluation.recipe import evaluate_recipe
from albef_ds.evaluation.relations import chain_of
from tests.shapes_recipes import built, write_task_recipe, write_world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def grounding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounding")
    config, tokenizer, model = built(write_task_recipe(folder, "grounding"))
    world, tasks = write_world(folder)
    entries = read_entries(tasks.grounding_test, referring(), {"": str(world.root)})
    return config, tokenizer, model, TaskSamples(entries, tokenizer, EvalTransform(32), 30, 40)


@pytest.mark.parametrize(
    ("by", "look", "layer"), [("itm", itm_heatmaps, None), ("itm", itm_heatmaps, 1), ("itc", itc_heatmaps, 0)]
)
def test_every_phrase_gets_the_map_that_it_has_alone(grounding, by, look, layer):
    _, _, model, samples = grounding
    found = ground_all(model, samples, CPU, by=by, layer=layer, size=7, workers=1)
    assert len(found) == len(samples)
    for i in (0, 6, 7, len(samples) - 1):
        sample = samples.load(i, None)
        expected = look(model, stacked([sample]), texts_of([sample]), layer).texts[0]
        largest = expected.max().item()
        torch.testing.assert_close(found[i].tensor(), expected, atol=1e-4 * largest, rtol=0)


def test_the_things_of_a_phrase_get_the_maps_that_they_have_alone(grounding):
    _, _, model, samples = grounding
    found = ground_all(model, samples, CPU, by="itc", layer=None, size=7, workers=1, relations=True)
    plain = ground_all(model, samples, CPU, by="itc", layer=None, size=7, workers=1)
    chains = [chain_of(e.text) for e in samples.entries]
    assert any(chains) and not all(chains)
    for i, chain in enumerate(chains):
        assert found[i].heatmap == plain[i].heatmap
        assert len(found[i].things) == (len(chain.things) if chain else 0)
        for thing, grid in zip(chain.things if chain else (), found[i].things, strict=True):
            sample = replace(samples.load(i, None), ids=samples.tokens(thing))
            expected = itc_heatmaps(model, stacked([sample]), texts_of([sample]), None).texts[0]
            torch.testing.assert_close(torch.Tensor(grid), expected, atol=1e-4 * expected.max().item(), rtol=0)


def test_relations_decide_between_proposals():
    upper_left, lower_right = (0.0, 0.0, 12.0, 12.0), (28.0, 28.0, 12.0, 12.0)
    phrase = replace(entry(upper_left, "test", (lower_right, upper_left)), text="the dog left of the cat")
    whole = hot(3, 3).heatmap  # shows the cat
    assert Grounded(whole).choice(phrase) == lower_right
    anywhere = tuple(tuple(1.0 for _ in row) for row in whole)
    related = Grounded(whole, (anywhere, whole))
    assert related.choice(phrase) == upper_left
    assert related.choice(replace(phrase, proposals=())) is None
    samples = TaskSamples([phrase], None, None)
    assert score(samples, [Grounded(whole)])["all"]["ranked"] == 0
    assert score(samples, [related])["all"]["ranked"] == 100
    (example,) = examples_of(samples, [related], 1)
    assert example.right is True and example.found_box == upper_left


def test_the_recipe_says_whether_relations_are_resolved(grounding):
    config, tokenizer, model, _ = grounding
    scores = {}
    for relations in (False, True):
        evaluation = config.evaluation.model_copy(update={"relations": relations})
        recipe = config.model_copy(update={"evaluation": evaluation})
        scores[relations] = evaluate_recipe(model, recipe, tokenizer, CPU, config.data.test).metrics
    assert scores[True]["appearance"] == scores[False]["appearance"]
    assert scores[True]["location"] != scores[False]["location"]


def entry(box, split: str, proposals=()) -> ReferringEntry:
    return ReferringEntry(("a.jpg",), "/", "the dog", 1, box, 40, 40, split, proposals)


def hot(row: int, column: int) -> Grounded:
    """A map of 4 x 4 that is hot in one place: pixels 10 * column to 10 * column + 10, likewise by row."""
    return Grounded(tuple(tuple(float((r, c) == (row, column)) for c in range(4)) for r in range(4)))


def test_scores_are_by_split_and_of_all():
    upper_left, lower_right = (0.0, 0.0, 12.0, 12.0), (28.0, 28.0, 12.0, 12.0)
    both = (upper_left, lower_right)
    entries = [entry(upper_left, "testA", both), entry(lower_right, "testA", both), entry(upper_left, "testB", both)]
    found = [hot(0, 0), hot(3, 3), hot(3, 3)]  # right, right, wrong
    metrics = score(TaskSamples(entries, None, None), found)
    assert set(metrics) == {"all", "testA", "testB"}
    for name in ("ranked", "pointing"):
        assert metrics["testA"][name] == 100 and metrics["testB"][name] == 0
        assert metrics["all"][name] == pytest.approx(200 / 3)


def test_without_proposals_nothing_is_ranked_and_pointing_is_the_score(grounding):
    config, tokenizer, model, samples = grounding
    file = Path(config.data.test)
    bare = file.with_name("bare.json")
    bare.write_text(
        json.dumps([{k: v for k, v in e.items() if k != "proposals"} for e in json.loads(file.read_text())])
    )
    result = evaluate_recipe(model, config, tokenizer, CPU, str(bare))
    assert result.metrics["all"]["ranked"] is None and result.score == result.metrics["all"]["pointing"]
    assert all(example.found == "box around the hottest region" for example in result.examples)


def test_examples_show_the_map_the_true_box_and_the_box_found():
    upper_left, lower_right = (0.0, 0.0, 12.0, 12.0), (28.0, 28.0, 12.0, 12.0)
    entries = [entry(upper_left, "test", (upper_left, lower_right))] * 2
    right, wrong = examples_of(TaskSamples(entries, None, None), [hot(0, 0), hot(3, 3)], 2)
    assert right.right is True and wrong.right is False
    assert right.found_box == right.true_box == upper_left and wrong.found_box == lower_right
    assert right.heatmap[0][0] == 1.0 and right.images == ("/a.jpg",)


def test_a_model_that_gives_no_numbers_is_refused(grounding):
    _, _, model, samples = grounding
    kept = model.itm_head.weight.detach().clone()
    with torch.no_grad():
        model.itm_head.weight[1, 0] = float("nan")
    try:
        with pytest.raises(EvaluationError, match="NaN or infinity"):
            ground_all(model, samples, CPU, by="itm", layer=None, size=7, workers=0)
    finally:
        with torch.no_grad():
            model.itm_head.weight.copy_(kept)
