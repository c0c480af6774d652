"""Questions about a scene that have exactly one right answer, and annotators who do not always give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from albef_ds.data.shapes_descriptions import VALUES, Description, draw_description, pick, sole_neighbour, unambiguous
from albef_ds.data.shapes_scene import BACKGROUND_COLOURS, COLOURS, OPPOSITE, SHAPES, SIZES, Scene, with_article

ANNOTATORS = 10
_NUMBERS = tuple("01234")
_OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
_YES_NO = ("yes", "no")
_LIKE = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}  # an attribute's possible answers
_SPOKEN = {"colour": "color", "shape": "shape", "size": "size"}
ANSWERS = sorted({*COLOURS, *BACKGROUND_COLOURS, *SHAPES, *SIZES, *_NUMBERS, *_YES_NO, *_OBJECTS})


@dataclass(frozen=True)
class Question:
    """A question, its right answer, and what VQA v2 would file it under."""

    text: str
    answer: str
    question_type: str  # its first words
    answer_type: str  # "yes/no", "number" or "other"
    possible: tuple[str, ...]  # answers that fit the question, the right one among them


def draw_questions(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """`count` different questions about the scene.

    Answers vary for each wording, and yes and no are equally likely: without the picture a guess is right a third of
    the time.
    """
    questions: dict[str, Question] = {}
    while len(questions) < count:
        kind = _KINDS[rng.choice(len(_KINDS), p=_SHARES)]
        question = kind(scene, rng)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def draw_answers(question: Question, rng: np.random.Generator) -> list[str]:
    """Ten annotators' answers: to three questions in ten, one or two annotators give a likely but wrong one."""
    answers = [question.answer] * ANNOTATORS
    wrong = [answer for answer in question.possible if answer != question.answer]
    for place in rng.permutation(ANNOTATORS)[: rng.choice(3, p=(0.7, 0.2, 0.1))]:
        answers[place] = pick(rng, wrong)
    return answers


def _attribute(asked: str, attribute_sets: tuple[tuple[str, ...], ...]) -> Callable:
    """The kind of question that asks for an attribute of an object described by others."""

    def ask(scene: Scene, rng: np.random.Generator) -> Question | None:
        candidates = unambiguous(scene, attribute_sets)
        if asked == "size":  # small ones fit in more often; asked equally often, the answer cannot be guessed
            size = pick(rng, VALUES["size"])
            candidates = [(i, d) for i, d in candidates if scene.objects[i].size == size]
        if not candidates:
            return None
        i, description = pick(rng, candidates)
        opening = f"what {_SPOKEN[asked]} is the"
        answer = getattr(scene.objects[i], asked)
        return Question(f"{opening} {description.words}", answer, opening, "other", _LIKE[asked])

    return ask


def _background(scene: Scene, rng: np.random.Generator) -> Question:
    text = "what color is the background"
    return Question(text, scene.background_colour, "what color is the", "other", tuple(BACKGROUND_COLOURS))


def _neighbour(scene: Scene, rng: np.random.Generator) -> Question | None:
    anchor, relation = int(rng.integers(len(scene.objects))), pick(rng, tuple(OPPOSITE))
    i = sole_neighbour(scene, relation, anchor)
    if i is None:
        return None
    named = [Description.of(scene.objects[j], ("colour", "shape")).words for j in (anchor, i)]
    return Question(f"what is {relation} the {named[0]}", named[1], "what is", "other", _OBJECTS)


def _how_many(scene: Scene, rng: np.random.Generator) -> Question | None:
    asked = pick(rng, ("object", "size", "colour", "shape", "shape"))
    if asked == "object":
        if len(scene.objects) == 2 and rng.random() < 0.6:
            return None  # two is the commonest number by far
        described = Description()
    else:
        counted = [(d := Description(**{asked: value}), d.count(scene)) for value in VALUES[asked]]
        number = pick(rng, sorted({n for _, n in counted}))
        described = pick(rng, [d for d, n in counted if n == number])
    text = f"how many {described.words}s are there"
    return Question(text, str(described.count(scene)), "how many", "number", _NUMBERS)


def _is_there(scene: Scene, rng: np.random.Generator) -> Question:
    true = bool(rng.integers(2))
    text = f"is there {with_article(draw_description(scene, true, rng).words)}"
    return Question(text, _YES_NO[not true], "is there", "yes/no", _YES_NO)


def _is_related(scene: Scene, rng: np.random.Generator) -> Question:
    (a, b), relation = pick(rng, sorted(scene.relations().items()))
    true = bool(rng.integers(2))
    named = [Description.of(scene.objects[i], ("colour", "shape")).words for i in (a, b)]
    text = f"is the {named[0]} {relation if true else OPPOSITE[relation]} the {named[1]}"
    return Question(text, _YES_NO[not true], "is the", "yes/no", _YES_NO)


_KINDS, _SHARES = zip(
    (_attribute("colour", (("shape",), ("size", "shape"), ("size",))), 0.24),
    (_attribute("shape", (("colour",), ("size", "colour"), ("size",))), 0.18),
    (_attribute("size", (("shape",), ("colour", "shape"))), 0.10),
    (_background, 0.08),
    (_neighbour, 0.10),
    (_how_many, 0.10),
    (_is_there, 0.12),
    (_is_related, 0.08),
    strict=True,
)
