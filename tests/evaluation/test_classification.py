"""Classes of a test set, and the accuracy that is made of them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.augment import EvalTransform
from albef_ds.data.task_entries import hypotheses, read_entries
from albef_ds.data.task_samples import LabelledSamples
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.classification import Classified, accuracy, classify, examples_of
from albef_ds.evaluation.recipe import evaluate_recipe
from albef_ds.tasks.entailment import LABELS
from tests.shapes_recipes import built, write_task_recipe, write_world

CPU = torch.device("cpu")


def found(*labels: int) -> list[Classified]:
    return [Classified(label, tuple(0.8 if i == label else 0.1 for i in range(3))) for label in labels]


def test_accuracy_by_hand():
    metrics = accuracy(found(0, 1, 1, 2, 2, 0), [0, 1, 2, 2, 2, -1], LABELS)
    assert metrics == {
        "accuracy": 80.0,
        "per_class": {"contradiction": 100.0, "neutral": 100.0, "entailment": pytest.approx(200 / 3)},
        "confusion": [[1, 0, 0], [0, 1, 0], [0, 1, 2]],
        "sentences": 6,
    }


def test_a_file_without_labels_has_a_number_of_sentences_and_nothing_else():
    assert accuracy(found(0, 1), [-1, -1], LABELS) == {"sentences": 2}


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=30))
def test_the_confusion_counts_every_labelled_sentence_once(pairs):
    metrics = accuracy(found(*[f for f, _ in pairs]), [t for _, t in pairs], LABELS)
    known = [(f, t) for f, t in pairs if t >= 0]
    assert metrics["sentences"] == len(pairs)
    if known:
        assert metrics["accuracy"] == pytest.approx(100 * sum(f == t for f, t in known) / len(known))
        assert sum(map(sum, metrics["confusion"])) == len(known)
        assert set(metrics["per_class"]) == {LABELS[t] for _, t in known}  # no share of no sentences


@pytest.fixture(scope="module")
def entailment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("entailment")
    config, tokenizer, model = built(write_task_recipe(folder, "entailment"))
    world, tasks = write_world(folder)
    entries = read_entries(tasks.entailment_test, hypotheses(labelled=False), {"": str(world.root)})
    return config, tokenizer, model, LabelledSamples(entries, tokenizer, EvalTransform(32), 30, 40)


def test_every_sentence_gets_the_class_that_the_model_gives_it_alone(entailment):
    _, _, model, samples = entailment
    together = classify(model, samples, CPU, size=7, workers=2)
    assert len(together) == len(samples) == 24 and len({f.probabilities for f in together}) > 12
    model.eval()
    for i in (0, 6, 7, 23):
        batch = samples.collate([samples.load(i, None)])
        with torch.no_grad():
            expected = model.classify(batch.images, batch.text).softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(together[i].probabilities), expected, atol=1e-5, rtol=1e-4)
        assert together[i].label == int(expected.argmax())


def test_an_unlabelled_file_gives_results_and_no_score(entailment, tmp_path):
    config, tokenizer, model, samples = entailment
    entries = json.loads(open(config.data.test).read())
    file = tmp_path / "unlabelled.json"
    file.write_text(json.dumps([{k: v for k, v in e.items() if k != "label"} for e in entries]))
    result = evaluate_recipe(model, config, tokenizer, CPU, str(file), tmp_path)
    assert result.metrics == {"sentences": len(entries)} and result.score is None
    said = json.loads((tmp_path / "results.json").read_text())
    assert len(said) == len(entries) and all(set(s) == {"label", "probabilities"} for s in said)
    expected = classify(model, samples, CPU, size=5, workers=0)
    assert [s["label"] for s in said] == [LABELS[f.label] for f in expected]
    assert [tuple(s["probabilities"]) for s in said] == [f.probabilities for f in expected]
    assert all(example.expected is None and example.right is None for example in result.examples)


def test_a_model_that_gives_no_numbers_is_refused(entailment):
    _, _, model, samples = entailment
    bias, kept = model.cls_head[2].bias, model.cls_head[2].bias.detach().clone()
    with torch.no_grad():
        bias[1] = float("nan")
    with pytest.raises(EvaluationError, match="NaN or infinity for a class"):
        classify(model, samples, CPU, size=7, workers=0)
    with torch.no_grad():
        bias.copy_(kept)


def test_examples_say_what_was_found_and_what_was_right(entailment):
    _, _, _, samples = entailment
    truth = [samples.entries[i].label for i in range(len(samples))]
    results = found(*[(label + i % 2) % 3 for i, label in enumerate(truth)])
    shown = examples_of(samples, results, LABELS, wanted=5)
    assert len(shown) == 5
    for example, i in zip(shown, (0, 6, 12, 17, 23), strict=True):
        assert example.text == samples.entries[i].text and example.images == samples.paths(samples.entries[i])
        assert example.right is (i % 2 == 0) and example.expected == LABELS[truth[i]]
        assert example.found == f"{LABELS[results[i].label]} (80%)"
