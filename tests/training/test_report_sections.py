"""Every task's numbers are shown under its name, and what is missing of them is said."""

import json

import pytest

from albef_ds.training.report import write_report
from tests.training.html_page import Page

ATTACK = '"><script>alert(1)</script><img src=x onerror=y>'
SUMMARIES = {
    "vqa": {
        "questions": 1234,
        "accuracy": 71.26,
        "per_answer_type": {"yes/no": 81.5, "number": 55.5},
        "per_question_type": {"how many": 33.3, "what is the": 44.4},
    },
    "entailment": {
        "accuracy": 62.5,
        "per_class": {"contradiction": 75.0, "entailment": 50.0},
        "confusion": [[3, 1, 0], [0, 0, 0], [1, 1, 2]],
        "sentences": 8,
    },
    "nlvr": {
        "accuracy": 66.6,
        "per_class": {"False": 60.0, "True": 73.2},
        "confusion": [[307, 205], [138, 374]],
        "sentences": 1024,
    },
    "grounding": {
        "all": {"ranked": 61.1, "pointing": 70.2, "centre": 66.4, "region": 31.0, "texts": 2048},
        "testB": {"ranked": None, "pointing": 52.5, "centre": 53.5, "region": 54.5, "texts": 7},
    },
}


@pytest.fixture
def page(tmp_path):
    """The page of a run with such a summary."""

    def written(summary):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        return Page(write_report(tmp_path).read_text())

    return written


@pytest.mark.parametrize(
    ("task", "title", "headline", "numbers"),
    [
        ("vqa", "Visual question answering", "71.3 %", ("71.3", "81.5", "55.5", "33.3", "44.4", "how many")),
        ("entailment", "Visual entailment", "62.5 %", ("62.5", "75.0", "50.0", "neutral")),
        ("nlvr", "Reasoning over two images", "66.6 %", ("60.0", "73.2", "307", "205", "138", "374")),
        ("grounding", "Grounding", "61.1 %", ("70.2", "66.4", "31.0", "2,048", "testB", "52.5", "53.5", "54.5", "–")),
    ],
)
def test_a_task_is_shown_with_its_main_number_on_top(page, task, title, headline, numbers):
    texts = page({task: SUMMARIES[task]}).texts
    assert title in texts and {*numbers} <= set(texts)
    assert texts.index(headline) < texts.index(title)
    assert f"{task}.accuracy" not in texts  # not once more in the table of the rest


def test_the_confusion_table_names_true_classes_down_and_found_ones_across(page):
    texts = [text for text in page({"entailment": SUMMARIES["entailment"]}).texts if text]
    start = texts.index("true ↓ found →")
    classes = ["contradiction", "neutral", "entailment"]
    rows = ["contradiction", "3", "1", "0", "neutral", "0", "0", "0", "entailment", "1", "1", "2"]
    assert texts[start + 1 : start + 16] == classes + rows


def test_without_proposals_pointing_is_the_main_number_of_grounding(page):
    texts = page({"grounding": {"all": {**SUMMARIES["grounding"]["all"], "ranked": None}}}).texts
    assert "grounding: pointing" in texts and "70.2 %" in texts


def test_sets_without_truth_say_that_there_is_no_accuracy(page):
    text = page({"vqa": {"questions": 5}, "nlvr": {"sentences": 6}}).text
    assert "not compared with annotations" in text and "5 questions" in text
    assert "the sentences have no labels" in text and "6 sentences" in text


@pytest.mark.parametrize("task", ["retrieval", *SUMMARIES])
@pytest.mark.parametrize("damage", [None, [], "x", 3, {}, {"accuracy": True}, {"accuracy": "1"}, {"all": 3}])
def test_what_is_no_result_is_said_to_be_none(page, task, damage):
    result = page({task: damage})
    gaps = [attrs for _, attrs in result.tags if attrs.get("class") == "gap"]
    assert len(gaps) == len([attrs for _, attrs in page({}).tags if attrs.get("class") == "gap"]) + 1


@pytest.mark.parametrize(
    "counts",
    [None, [], [[1, 2], [3, 4]], [[1, 2, 3], [1, 2], [1, 2, 3]], [[1, 2, 3]] * 2 + [[1, 2, "3"]], [[1, 2, -3]] * 3],
)
def test_a_confusion_table_of_another_form_is_not_shown(page, counts):
    text = page({"entailment": {**SUMMARIES["entailment"], "confusion": counts}}).text
    assert "confusion table cannot be shown" in text and "62.5" in text


def test_names_of_splits_types_and_classes_cannot_act_as_markup(page):
    result = page(
        {
            "vqa": {"questions": ATTACK, "accuracy": 1.0, "per_answer_type": {ATTACK: 2, "t": ATTACK}},
            "nlvr": {**SUMMARIES["nlvr"], "per_class": {ATTACK: 250.0}},
            "grounding": {ATTACK: {"ranked": ATTACK, "texts": ATTACK}},
        }
    )
    result.assert_harmless()
    assert result.texts.count(ATTACK) == 3
    assert "width:100.0%" in [attrs.get("style") for tag, attrs in result.tags if tag == "span"]  # no bar runs out
