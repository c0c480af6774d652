import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from albef_ds.data.annotations import AnnotationError
from albef_ds.evaluation.vqa_accuracy import (
    VqaResultError,
    VqaScore,
    normalise_answer,
    question_accuracy,
    score_vqa,
    write_results,
)

# Answer, how many people gave which, and what the official script (with its prints in Python 3) made of it, in percent.
OFFICIAL = [
    ("yes", {"yes": 10}, 100.0),
    ("yes", {"yes": 4, "no": 6}, 100.0),
    ("yes", {"yes": 3, "no": 7}, 90.0),
    ("yes", {"yes": 2, "no": 8}, 60.0),
    ("yes", {"yes": 1, "no": 9}, 30.0),
    ("yes", {"no": 10}, 0.0),
    ("yes", {"yes": 1}, 0.0),
    ("yes", {"yes": 2, "no": 1}, 44.4444),
    ("yes", {"yes": 3}, 66.6667),
    ("Two.", {"two": 10}, 0.0),
    (" two\n", {"two": 10}, 100.0),
    ("2", {"two": 10}, 0.0),
    ("the dog", {"dog": 10}, 0.0),
    ("dont", {"don't": 10}, 0.0),
    ("none", {"none ": 4, "none": 6}, 100.0),
    ("2", {"two": 9, "2": 1}, 100.0),
    ("two", {"2": 1, "two.": 1, "TWO": 1, "3": 7}, 90.0),
    ("none", {"0": 1, "zero": 1, "nothing": 8}, 60.0),
    ("eleven", {"11": 8, "eleven": 2}, 60.0),
    ("ten", {"10": 1, "Ten!": 1, "9": 8}, 60.0),
    ("the dog", {"dog": 1, "a dog": 1, "cat": 8}, 60.0),
    ("a", {"": 1, "an": 1, "b": 8}, 60.0),
    ("dont know", {"don't know": 2, "unknown": 8}, 60.0),
    ("youd've", {"you'd've": 2, "youdve": 8}, 60.0),
    ("somebody'd", {"somebodyd": 2, "who": 8}, 60.0),
    ("Im", {"I'm": 8, "im": 2}, 60.0),
    ("lets go", {"let's go": 8, "lets go": 2}, 60.0),
    ("What's   that", {"whats that": 2, "what": 8}, 60.0),
    ("'ows'at", {"ow's'at": 2, "owsat": 8}, 60.0),
    ("rock 'n' roll", {"rock n roll": 8, "rock 'n' roll": 2}, 60.0),
    ("t-shirt", {"t shirt": 1, "tshirt": 9}, 30.0),
    ("t -shirt", {"tshirt": 9, "t shirt": 1}, 30.0),
    ("t -shirt t-shirt", {"tshirt t shirt": 9, "t shirt tshirt": 1}, 30.0),
    ("yes/no", {"yes no": 1, "yesno": 9}, 30.0),
    ("1,000", {"1000": 1, "1 000": 9}, 30.0),
    ("1,000 blue-green", {"1000 bluegreen": 1, "1000 blue green": 9}, 30.0),
    ("red,blue", {"red blue": 1, "redblue": 9}, 30.0),
    ("red, blue", {"red blue": 1, "redblue": 9}, 30.0),
    ("3.5", {"3.5": 1, "35": 9}, 30.0),
    ("35.", {"35": 1, "3.5": 9}, 30.0),
    ("p.m.", {"pm": 1, "p m": 9}, 30.0),
    ("5.p", {"5p": 1, "5.p.": 1, "5 p": 8}, 60.0),
    ("$5", {"5": 9, "$5": 1}, 30.0),
    ("." * 33, {"." * 34: 8, "." * 33: 2}, 60.0),
    ("a\tdog", {"dog": 3, "cat": 7}, 90.0),
    ("(red)", {"red": 1, "[red]": 1, "blue": 8}, 60.0),
    ("`x`", {"x": 1, "y": 9}, 30.0),
    ("É", {"é": 1, "e": 9}, 30.0),
]


@pytest.mark.parametrize("answer, people, percent", OFFICIAL)
def test_equals_what_the_official_script_gave(answer, people, percent):
    human = [text for text, count in people.items() for _ in range(count)]
    assert 100 * question_accuracy(answer, human) == pytest.approx(percent, abs=1e-4)
    assert question_accuracy(answer, human[::-1]) == pytest.approx(question_accuracy(answer, human))


def test_the_definition_worked_out_by_hand():
    # Two of ten said "cat". Without one of these two, one is left: 1/3. Without one of the other eight: 2/3.
    assert question_accuracy("cat", ["cat"] * 2 + ["dog"] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    # Three said so: two are left for those three, and three for the other seven, which is full marks.
    assert question_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    with pytest.raises(ValueError, match="no human answer"):
        question_accuracy("cat", [])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The cat's 1,5-x [ok]", "cat's 15x ok"),
        ("A  an THE", ""),
        ("one_two", "1 2"),
        ("yes!no ?", "yes no"),
        ("x.5.", "x.5"),
        ("none, thanks", "0 thanks"),
        ("Dont\tYALL'LL", "don't y'all'll"),
    ],
)
def test_normalised_as_by_the_official_script(text, expected):
    assert normalise_answer(text) == expected


@given(st.text("aATtwo 1,.-/'\n\t?", max_size=30))
@example("." * 40)
def test_normalised_answers_hold_no_marks_articles_or_capitals(text):
    words = normalise_answer(text).split()
    assert not set("".join(words)) & set("-/?,") and not {"a", "an", "the", "two", "one"} & set(words)
    assert all(word == word.lower() for word in words)


@given(
    st.sampled_from(["red", "Red.", "the red", "2", "two"]), st.lists(st.sampled_from(["red", "2", "x"]), min_size=1)
)
def test_accuracy_is_a_share_and_more_agreement_never_lowers_it(answer, human):
    accuracy = question_accuracy(answer, human)
    assert 0 <= accuracy <= 1
    if len(set(human)) > 1:
        assert question_accuracy(answer, [*human, normalise_answer(answer)]) >= accuracy - 1e-12


def question(question_id, human, answer_type="other", question_type="what is"):
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(human)]
    types = {"answer_type": answer_type, "question_type": question_type}
    return {"question_id": question_id, "image_id": 5, "multiple_choice_answer": human[0], "answers": answers} | types


ANNOTATIONS = {
    "info": {},
    "annotations": [
        question(7, ["yes"] * 10, "yes/no", "is the"),
        question(3, ["two"] * 2 + ["3"] * 8, "number", "how many"),
        question(9, ["cat"] * 10),
        question(1, ["no"] * 1 + ["yes"] * 9, "yes/no", "what is"),
    ],
}
RESULTS = [{"question_id": q, "answer": a} for q, a in ((1, "no"), (9, "Cat"), (7, "yes"), (3, "2"))]


@pytest.mark.parametrize("as_file", [True, False])
def test_scores_by_type(tmp_path, as_file):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(ANNOTATIONS))
    assert score_vqa(RESULTS, file if as_file else ANNOTATIONS) == VqaScore(
        overall=pytest.approx((100 + 60 + 0 + 30) / 4),
        per_answer_type={"yes/no": pytest.approx(65), "number": pytest.approx(60), "other": 0},
        per_question_type={"is the": pytest.approx(100), "how many": pytest.approx(60), "what is": pytest.approx(15)},
        questions=4,
    )


def test_scoring_leaves_the_annotations_alone():
    before = json.dumps(ANNOTATIONS)
    assert score_vqa(RESULTS, ANNOTATIONS) == score_vqa(RESULTS, ANNOTATIONS)
    assert json.dumps(ANNOTATIONS) == before


BAD_RESULTS = [
    (RESULTS[1:], "1 question ids without an answer: .*: 1$"),
    ([*RESULTS, {"question_id": 70, "answer": "x"}], "1 question ids not in the .*: 70$"),
    ([*RESULTS, RESULTS[0]], "1 question ids answered more than once: .*: 1$"),
    ([], r"4 question ids without an answer"),
    ([*RESULTS[1:], {"question_id": "1", "answer": "x"}], "result 3 is .*expected"),
    ([*RESULTS[1:], {"question_id": 1}], "result 3 is .*expected"),
    ([*RESULTS[1:], {"question_id": 1, "answer": 2}], "result 3, question 1: the answer is 2, expected a string"),
    ([*RESULTS[1:], None], "result 3 is None"),
]


@pytest.mark.parametrize("results, message", BAD_RESULTS)
def test_refuses_what_the_server_would_refuse(tmp_path, results, message):
    with pytest.raises(VqaResultError, match=message):
        score_vqa(results, ANNOTATIONS)
    with pytest.raises(VqaResultError, match=message):
        write_results(tmp_path / "results.json", results, [7, 3, 9, 1])
    assert not list(tmp_path.iterdir())


def test_names_only_a_few_of_many_ids():
    many = {"annotations": [question(q, ["x"]) for q in range(100)]}
    with pytest.raises(VqaResultError, match=r": 1, 2, 3, 4, 5 and 94 more$"):
        score_vqa([{"question_id": 0, "answer": "x"}], many)


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "expected {"),
        ({"annotations": []}, "expected {"),
        ({"questions": [{"question_id": 1, "question": "what?"}]}, "the questions file is another one"),
        ({"annotations": [{"question_id": 1}]}, "entry 0: no usable question .*answer_type"),
        ({"annotations": [question(1, ["x"]) | {"answers": []}]}, "question 1: expected types and at least one answer"),
        ({"annotations": [question(1, [3])]}, "question 1: expected types"),
        ({"annotations": [question(1, ["x"]), question(1, ["y"])]}, "question 1 is there twice"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, content, message):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=f"{re.escape(str(file))}.*{message}"):
        score_vqa(RESULTS, file)


def test_annotation_files_that_cannot_be_read(tmp_path):
    with pytest.raises(AnnotationError, match="cannot be read"):
        score_vqa(RESULTS, tmp_path / "missing.json")
    (tmp_path / "cut.json").write_text('{"annotations": [')
    with pytest.raises(AnnotationError, match="not valid JSON"):
        score_vqa(RESULTS, tmp_path / "cut.json")


def test_writes_the_servers_file(tmp_path):
    file = tmp_path / "vqa_result.json"
    file.write_text("old")
    write_results(file, [result | {"score": 0.5} for result in RESULTS], (q for q in (1, 3, 7, 9)))
    assert json.loads(file.read_text()) == RESULTS  # in their order, nothing added
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    write_results(file, RESULTS[:1])  # without the questions it cannot know that three are missing
    assert json.loads(file.read_text()) == RESULTS[:1]
