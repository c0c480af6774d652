"""The fine-tuning tasks' JSON files: what is read, what is left out and named, and nothing else."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.annotations import AnnotationError
from albef_ds.data.task_entries import (
    captions_by_id,
    hypotheses,
    phrases,
    questions,
    read_entries,
    referring,
    statements,
)

PARSERS = {
    "retrieval": captions_by_id,
    "grounding": phrases,
    "vqa": questions,
    "vqa test": lambda: questions(answered=False),
    "entailment": hypotheses,
    "entailment test": lambda: hypotheses(labelled=False),
    "nlvr": statements,
    "nlvr test": lambda: statements(labelled=False),
    "referring": referring,
}
GOOD = {
    "retrieval": {"image": "a.jpg", "caption": "a dog", "image_id": "coco_7"},
    "grounding": {"image": "a.jpg", "text": "the dog"},
    "vqa": {"image": "a.jpg", "question": "what?", "answer": ["yes", "no"], "question_id": 3, "dataset": "vqa"},
    "vqa test": {"image": "a.jpg", "question": "what?", "question_id": 3},
    "entailment": {"image": "a", "sentence": "a dog", "label": "neutral"},
    "entailment test": {"image": "a", "sentence": "a dog"},
    "nlvr": {"images": ["a.png", "b.png"], "sentence": "a dog", "label": "True"},
    "nlvr test": {"images": ["a.png", "b.png"], "sentence": "a dog"},
    "referring": {"image": "a.jpg", "text": "the dog", "box": [1, 2.5, 3, 4], "width": 9, "height": 8},
}


def write(folder, entries, name: str = "entries.json"):
    path = folder / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def read(folder, kind: str, *entries, roots=None):
    return read_entries(write(folder, list(entries)), PARSERS[kind](), roots or {})


def changed(kind: str, **values) -> dict:
    entry = {**GOOD[kind], **values}
    return {key: value for key, value in entry.items() if value is not ...}


TEXTLESS = [("is missing", None), ("is missing", ...), ("without any text", "  "), ("a number without", 7)]
BAD = [
    *[("retrieval", f'"{key}" ', {key: value}, why) for key in ("image", "caption") for why, value in TEXTLESS],
    ("retrieval", '"image_id" is missing', {"image_id": ...}, "captions belong to the same image"),
    *[("grounding", f'"{key}" ', {key: value}, why) for key in ("image", "text") for why, value in TEXTLESS],
    *[("vqa", f'"{key}" ', {key: value}, why) for key in ("image", "question") for why, value in TEXTLESS],
    *[("vqa", '"question_id" is', {"question_id": value}, "whole number") for value in ("3", True, 1.5, [3])],
    *[
        ("vqa", '"answer" holds no text', {"answer": a}, "expected a text")
        for a in (..., None, "", " ", [], [7, ""], {})
    ],
    *[("vqa test", '"answer" holds no text', {"answer": a}, "expected a text") for a in ("", [], [None])],
    *[("entailment", f'"{key}" ', {key: value}, why) for key in ("image", "sentence") for why, value in TEXTLESS],
    *[
        ("entailment", '"label" is', {"label": v}, "contradiction, neutral, entailment")
        for v in (..., None, "-", 1, [])
    ],
    ("entailment test", '"label" is', {"label": "-"}, "contradiction, neutral, entailment"),
    *[
        ("nlvr", '"images" must be', {"images": v}, "two paths")
        for v in (..., "a", ["a"], ["a", ""], ["a", 1], ["a"] * 3)
    ],
    *[("nlvr", '"sentence" ', {"sentence": value}, why) for why, value in TEXTLESS],
    *[("nlvr", '"label" is', {"label": v}, "False, True") for v in (..., "true", 1, "neutral")],
    *[("referring", f'"{key}" ', {key: value}, why) for key in ("image", "text") for why, value in TEXTLESS],
    *[("referring", '"width" and "height"', {"width": v}, "size in pixels") for v in (..., 0, -1, 2.5, True, "9")],
    *[
        ("referring", '"box"', {"box": v}, "[x, y, width, height]")
        for v in (
            ...,
            None,
            [1, 2, 3],
            [1, 2, 3, "4"],
            [1, 2, 3, math.nan],
            [1, 2, math.inf, 4],
            [1, 2, 3, True],
            "1234",
        )
    ],
    ("referring", '"box"', {"box": [1, 2, 3, 10**400]}, "[x, y, width, height]"),
    ("referring", '"proposals" must be', {"proposals": {}}, "list of boxes"),
    *[
        ("referring", '"proposals"', {"proposals": [[1, 2, 3, 4], v]}, "[x, y, width")
        for v in (None, [1], [math.nan] * 4)
    ],
]


@pytest.mark.parametrize(("kind", "what", "values", "why"), BAD, ids=lambda v: json.dumps(v, default=str)[:40])
def test_an_unusable_entry_is_left_out_and_named(tmp_path, kind, what, values, why):
    entries = read(tmp_path, kind, GOOD[kind], changed(kind, **values), GOOD[kind])
    assert len(entries) == 2
    [(key, reason)] = entries.rejected
    assert key == "entries.json#1"
    assert reason.startswith(f"{tmp_path / 'entries.json'}, entry 1: ") and what in reason and why in reason


@pytest.mark.parametrize("kind", PARSERS)
def test_a_file_without_a_usable_entry_says_why(tmp_path, kind):
    with pytest.raises(AnnotationError, match="no usable entry in .*entries.json.*expected an object, found a number"):
        read(tmp_path, kind, 7, [], "a")
    with pytest.raises(AnnotationError, match="no usable entry in .*the list is empty"):
        read(tmp_path, kind)
    with pytest.raises(AnnotationError, match="no usable entry in no file at all"):
        read_entries([], PARSERS[kind](), {})
    with pytest.raises(AnnotationError, match="nowhere.json cannot be read"):
        read_entries(tmp_path / "nowhere.json", PARSERS[kind](), {})
    with pytest.raises(AnnotationError, match="expected a list"):
        read_entries(write(tmp_path, {"annotations": []}), PARSERS[kind](), {})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
KEYS = sorted({key for entry in GOOD.values() for key in entry} | {"dataset", "proposals", "ref_id", "split"})


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(PARSERS)), data=st.data())
def test_arbitrary_json_is_read_or_rejected(kind, data, tmp_path_factory):
    """Good entries with anything put in for some of their values, and anything at all."""
    spoilt = st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=3).map(lambda v: {**GOOD[kind], **v})
    content = data.draw(ANYTHING | st.lists(spoilt | ANYTHING, max_size=4))
    path = write(tmp_path_factory.mktemp("any"), content)
    try:
        entries = read_entries(path, PARSERS[kind](), {"": "/root"})
    except AnnotationError:
        return
    assert len(entries) + len(entries.rejected) == len(content)
    for entry in entries:
        assert entry.text.strip() and all(isinstance(image, str) and image for image in entry.images)


def test_entries_come_back_as_written_in_the_order_of_the_files(tmp_path):
    odd = "half \ud83d, a \u0000, 犬 \n"
    files = [
        write(tmp_path, [GOOD["grounding"], {"image": "b.jpg", "text": odd}], "one.json"),
        write(tmp_path, [{"image": "c.jpg", "text": "last"}], "two.json"),
    ]
    entries = read_entries(files, phrases(), {})
    assert [entry.text for entry in entries] == ["the dog", odd, "last"]
    assert entries[-1] == entries[2] and entries[0].images == ("a.jpg",)
    with pytest.raises(IndexError):
        entries[3]


def test_equal_ids_get_equal_numbers_over_all_files(tmp_path):
    ids = ["coco_7", 7, "7", "coco_8", {"a": 1}, "coco_7", 7]
    files = [
        write(tmp_path, [changed("retrieval", image_id=i) for i in part], f"{n}.json")
        for n, part in enumerate((ids[:4], ids[4:]))
    ]
    numbers = [entry.id for entry in read_entries(files, captions_by_id(), {})]
    assert numbers == [0, 1, 2, 3, 4, 0, 1]


def test_a_grounding_image_is_known_by_its_name(tmp_path):
    """As in the reference: the part behind the last slash."""
    images = ["x/a.jpg", "y/a.jpg", "a.jpg", "x/b.jpg"]
    entries = read(tmp_path, "grounding", *[changed("grounding", image=image) for image in images])
    assert [entry.id for entry in entries] == [0, 0, 0, 1]
    assert [entry.images for entry in entries] == [(image,) for image in images]


@settings(max_examples=50, deadline=None)
@given(answers=st.lists(st.sampled_from(["yes", "no", "maybe", "2"]), min_size=1, max_size=10))
def test_an_answer_weighs_its_share_of_the_annotators(answers, tmp_path_factory):
    [entry] = read(tmp_path_factory.mktemp("vqa"), "vqa", changed("vqa", answer=answers))
    counted = Counter(answers)
    assert dict(zip(entry.answers, entry.weights, strict=True)) == pytest.approx(
        {answer: count / len(answers) for answer, count in counted.items()}
    )
    assert entry.answers == tuple(dict.fromkeys(answers)) and sum(entry.weights) == pytest.approx(1)


def test_the_one_answer_of_a_visual_genome_question_weighs_what_the_recipe_says(tmp_path):
    path = write(tmp_path, [changed("vqa", dataset="vg", answer="a red ball")])
    for weight in (0.5, 0.25):
        [entry] = read_entries(path, questions(weight), {})
        assert (entry.answers, entry.weights) == (("a red ball",), (weight,))


def test_roots_go_by_the_data_set(tmp_path):
    entries = [changed("vqa", dataset=name) for name in ("vqa", "vg", "else", ...)]
    found = [e.root for e in read(tmp_path, "vqa", *entries, roots={"vqa": "/coco", "vg": "/genome", "": "/rest"})]
    assert found == ["/coco", "/genome", "/rest", "/rest"]
    found = [e.root for e in read(tmp_path, "vqa", *entries, roots={"vg": "/genome", "": None})]
    assert found == [str(tmp_path), "/genome", str(tmp_path), str(tmp_path)]  # the file's folder


def test_labels_are_the_references_numbers(tmp_path):
    labels = ["entailment", "contradiction", "neutral"]
    assert [e.label for e in read(tmp_path, "entailment", *[changed("entailment", label=v) for v in labels])] == [
        2,
        0,
        1,
    ]
    labels = ["True", "False", True, False]
    assert [e.label for e in read(tmp_path, "nlvr", *[changed("nlvr", label=v) for v in labels])] == [1, 0, 1, 0]
    assert [e.label for e in read(tmp_path, "nlvr test", GOOD["nlvr test"], GOOD["nlvr"])] == [-1, 1]


def test_an_entailment_image_may_come_without_its_ending(tmp_path):
    images = ["12", "12.jpg", "a.b", "A.PNG", "c.jpeg"]
    found = read(tmp_path, "entailment", *[changed("entailment", image=image) for image in images])
    assert [entry.images[0] for entry in found] == ["12.jpg", "12.jpg", "a.b.jpg", "A.PNG", "c.jpeg"]
