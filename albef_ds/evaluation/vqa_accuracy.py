"""The accuracy of VQA v2, number for number as its official evaluation script gives it.

Source: PythonEvaluationTools/vqaEvaluation/vqaEval.py of github.com/GT-Vision-Lab/VQA. Its particulars are part of the
metric and kept:

- Answers are normalised only where the humans disagree. Where all ten gave the same answer, only white space counts as
  equal: "Two." is wrong if all humans wrote "two".
- A comma between digits anywhere in an answer makes every punctuation mark vanish instead of becoming a space.
- Only the first 32 full stops are removed, and none before a digit.
- "none" is "0".

The copy in the reference (vqaTools/vqaEval.py) differs: it normalises the model's answer always, and of the humans'
answers the punctuation alone, so that the answer "two" does not equal a human's "two".
"""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from albef_ds.data.annotations import AnnotationError
from albef_ds.data.files import write_atomically

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS_REMOVED = 32  # the script hands re.UNICODE, which is 32, to the parameter that limits the count

_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(i) for i, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}
_ARTICLES = frozenset({"a", "an", "the"})

# The script's table lists, for these words, every spelling that lacks one of the apostrophes.
_CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_SPELLING = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the script

_SHOWN = 5  # ids in an error message


class VqaResultError(ValueError):
    """Results that are not exactly one answer to every question; the evaluation server takes no others."""


@dataclass(frozen=True)
class VqaScore:
    """Accuracies in percent, unrounded (the official script prints two decimals)."""

    overall: float
    per_answer_type: dict[str, float]  # "yes/no", "number", "other"
    per_question_type: dict[str, float]  # "what is the", "how many", …
    questions: int


def normalise_answer(text: str) -> str:
    """An answer without punctuation, capitals and articles, numbers as digits, apostrophes where they belong."""
    text = _trimmed(text)
    joined = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        vanishes = joined or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if vanishes else " ")
    plain = _FULL_STOP.sub("", plain, count=_FULL_STOPS_REMOVED)
    words = (_NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def question_accuracy(answer: str, human: Sequence[str]) -> float:
    """The accuracy of one answer, 0 to 1.

    Each human in turn is left out: an answer that at least three of the others gave is right, one that two or one gave
    is two thirds or one third right. The result is the mean over the humans.

    human: what the people answered, ten of them in VQA. Raises ValueError where there is none.
    """
    if not human:
        raise ValueError("no human answer to compare with: expected ten a question")
    answer, human = _trimmed(answer), [_trimmed(h) for h in human]
    if len(set(human)) > 1:
        answer, human = normalise_answer(answer), [normalise_answer(h) for h in human]
    matches = human.count(answer)
    return sum(min(1.0, (matches - (h == answer)) / 3) for h in human) / len(human)


def score_vqa(results: Sequence[Mapping], annotations: Mapping | str | os.PathLike) -> VqaScore:
    """Scores a model's answers.

    Args:
        results: `{"question_id": int, "answer": str}` for every question of the annotations, in any order.
        annotations: the official annotation file (v2_mscoco_val2014_annotations.json, …), its path or its contents.

    Raises VqaResultError where a question has no answer or two, or an answer no question; AnnotationError where the
    annotations are not of the official form.
    """
    questions = _questions(annotations)
    answers = _checked(results, questions, "the annotations")
    everything: list[float] = []
    by_answer_type: dict[str, list[float]] = {}
    by_question_type: dict[str, list[float]] = {}
    for question_id, (answer_type, question_type, human) in questions.items():
        accuracy = question_accuracy(answers[question_id], human)
        everything.append(accuracy)
        by_answer_type.setdefault(answer_type, []).append(accuracy)
        by_question_type.setdefault(question_type, []).append(accuracy)
    return VqaScore(
        overall=_percent(everything),
        per_answer_type={name: _percent(values) for name, values in by_answer_type.items()},
        per_question_type={name: _percent(values) for name, values in by_question_type.items()},
        questions=len(everything),
    )


def write_results(
    path: str | os.PathLike, results: Sequence[Mapping], question_ids: Iterable[int] | None = None
) -> None:
    """Writes the evaluation server's file, `[{"question_id": int, "answer": str}, …]`, in the order of the results.

    The file is there whole or not at all. Other fields of the results are left out.

    question_ids: all questions of the split. Where given, exactly these must be answered.
    Raises VqaResultError for two answers to a question, one missing or one too many.
    """
    answers = _checked(results, None if question_ids is None else dict.fromkeys(question_ids), "the questions")
    entries = [{"question_id": question_id, "answer": answer} for question_id, answer in answers.items()]
    write_atomically(Path(path), json.dumps(entries))


def _trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _percent(accuracies: list[float]) -> float:
    return 100.0 * sum(accuracies) / len(accuracies)


def _checked(results: Sequence[Mapping], expected: Mapping | None, source: str) -> dict[int, str]:
    """{question id: answer} in the order of the results."""
    answers: dict[int, str] = {}
    twice = []
    for i, result in enumerate(results):
        try:
            question_id, answer = operator.index(result["question_id"]), result["answer"]
        except (KeyError, TypeError, IndexError):
            raise VqaResultError(f'result {i} is {result!r}: expected {{"question_id": int, "answer": str}}') from None
        if not isinstance(answer, str):
            raise VqaResultError(f"result {i}, question {question_id}: the answer is {answer!r}, expected a string")
        if question_id in answers:
            twice.append(question_id)
        answers[question_id] = answer
    _refuse(twice, "answered more than once: leave the repeats out")
    if expected is not None:
        _refuse([q for q in answers if q not in expected], f"not in {source}: answer the questions of this split only")
        _refuse([q for q in expected if q not in answers], "without an answer: the server takes complete files only")
    return answers


def _refuse(question_ids: list, fault: str) -> None:
    if question_ids:
        more = f" and {len(question_ids) - _SHOWN:,} more" if len(question_ids) > _SHOWN else ""
        shown = ", ".join(map(str, question_ids[:_SHOWN]))
        raise VqaResultError(f"{len(question_ids):,} question ids {fault}: {shown}{more}")


def _questions(annotations: Mapping | str | os.PathLike) -> dict[int, tuple[str, str, list[str]]]:
    """{question id: (answer type, question type, human answers)}"""
    name = "the annotations"
    if not isinstance(annotations, Mapping):
        name = os.fspath(annotations)
        try:
            with open(annotations, encoding="utf-8-sig") as file:
                annotations = json.load(file)
        except OSError as error:
            raise AnnotationError(f"{name} cannot be read: {error.strerror or error}; check the path") from error
        except (ValueError, RecursionError) as error:
            raise AnnotationError(f"{name} is not valid JSON: {error}") from error
    entries = annotations.get("annotations") if isinstance(annotations, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise AnnotationError(
            f'{name}: expected {{"annotations": [a question or more]}}, as in v2_mscoco_val2014_annotations.json; '
            "the questions file is another one, and test splits have no annotations"
        )
    questions: dict[int, tuple[str, str, list[str]]] = {}
    for i, entry in enumerate(entries):
        try:
            question_id = operator.index(entry["question_id"])
            answer_type, question_type = entry["answer_type"], entry["question_type"]
            human = [answer["answer"] for answer in entry["answers"]]
        except (KeyError, TypeError, IndexError) as error:
            raise AnnotationError(f"{name}, entry {i}: no usable question ({type(error).__name__}: {error})") from error
        if not human or not all(isinstance(text, str) for text in (answer_type, question_type, *human)):
            raise AnnotationError(f"{name}, question {question_id}: expected types and at least one answer, all texts")
        if question_id in questions:
            raise AnnotationError(f"{name}: question {question_id} is there twice")
        questions[question_id] = (answer_type, question_type, human)
    return questions
