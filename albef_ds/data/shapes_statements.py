"""Statements about a scene or two that are true, false or open, and phrases that mean one object of a scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from albef_ds.data.shapes_descriptions import (
    VALUES,
    Description,
    draw_description,
    pick,
    sole_neighbour,
    unambiguous,
)
from albef_ds.data.shapes_scene import BACKGROUND_COLOURS, OPPOSITE, Scene, with_article

LABELS = ("entailment", "neutral", "contradiction")
_KIND = ("colour", "shape")  # of a scene's objects no two have both in common
_OPEN = (
    "the {} is made of wood",
    "the {} is made of paper",
    "the {} is made of glass",
    "the {} is made of metal",
    "the {} was drawn by a child",
    "the {} was drawn by an artist",
    "the {} will move soon",
)
_TRIES = 300  # partners for a statement about two images, before another kind of statement is taken
_PHRASE_FORMS = (
    ("shape",),
    ("colour",),
    ("size",),
    ("colour", "shape"),
    ("size", "shape"),
    ("size", "colour", "shape"),
)


def draw_hypothesis(scene: Scene, label: str, rng: np.random.Generator) -> str:
    """A sentence that the picture entails, contradicts, or leaves open ("neutral": about what no picture shows).

    What is entailed and what is contradicted is worded alike, equally often.
    """
    if label == "neutral":
        return _open(scene, rng)
    while True:
        kind = _HYPOTHESES[rng.choice(len(_HYPOTHESES), p=_HYPOTHESIS_SHARES)]
        sentence = kind(scene, label == "entailment", rng)
        if sentence is not None:
            return sentence


def _open(scene: Scene, rng: np.random.Generator) -> str:
    named = pick(rng, unambiguous(scene, (_KIND,)))[1].words
    covers = [o for o in scene.objects if o.size == "large"]
    if covers and rng.random() < 0.3:  # only a large object can hide another one
        cover = Description.of(pick(rng, covers), ("size", *_KIND))
        hidden = Description("small", pick(rng, VALUES["colour"]), pick(rng, VALUES["shape"]))
        return f"there is a {hidden.words} behind the {cover.words}"
    return pick(rng, _OPEN).format(named)


def _there_is(scene: Scene, true: bool, rng: np.random.Generator) -> str:
    return f"there is {with_article(draw_description(scene, true, rng).words)}"


def _is_coloured(scene: Scene, true: bool, rng: np.random.Generator) -> str | None:
    candidates = unambiguous(scene, (("shape",), ("size", "shape")))
    if not candidates:
        return None
    i, description = pick(rng, candidates)
    return f"the {description.words} is {_or_another(scene.objects[i].colour, VALUES['colour'], true, rng)}"


def _background(scene: Scene, true: bool, rng: np.random.Generator) -> str:
    return f"the background is {_or_another(scene.background_colour, tuple(BACKGROUND_COLOURS), true, rng)}"


def _or_another(value: str, values: Sequence[str], true: bool, rng: np.random.Generator) -> str:
    return value if true else pick(rng, [other for other in values if other != value])


def _related(scene: Scene, true: bool, rng: np.random.Generator) -> str:
    (a, b), relation = pick(rng, sorted(scene.relations().items()))
    named = [Description.of(scene.objects[i], _KIND) for i in (a, b)]
    if not true and rng.random() < 0.5:
        relation = OPPOSITE[relation]
    elif not true:
        place, changed = int(rng.integers(2)), pick(rng, _KIND)
        others = [replace(named[place], **{changed: value}) for value in VALUES[changed]]
        named[place] = pick(rng, [d for d in others if not d.count(scene)])
    first, second = (with_article(d.words) for d in named)
    return f"{first} is {relation} {second}"


_HYPOTHESES, _HYPOTHESIS_SHARES = zip(
    (_there_is, 0.4), (_is_coloured, 0.25), (_background, 0.15), (_related, 0.2), strict=True
)


def draw_statement(
    scenes: Sequence[Scene], i: int, true: bool, rng: np.random.Generator
) -> tuple[tuple[int, int], str]:
    """((left, right) numbers of scenes, scene i one of them; a statement about the two that is true or false).

    Each kind of statement is equally often true and false, wherever there are enough scenes to find partners in.
    """
    while True:
        kind = _STATEMENTS[rng.choice(len(_STATEMENTS), p=_STATEMENT_SHARES)]
        for _ in range(_TRIES):
            partner = (i + int(rng.integers(1, len(scenes)))) % len(scenes)
            left, right = (i, partner) if rng.random() < 0.5 else (partner, i)
            sentence = kind((scenes[left], scenes[right]), true, rng)
            if sentence is not None:
                return (left, right), sentence


def draw_another(pair: tuple[Scene, Scene], true: bool, rng: np.random.Generator) -> str:
    """A further statement about two scenes that were drawn already, of the kinds that any two scenes can be true and
    false of: so that the wording does not tell."""
    while True:
        sentence = (_in_one, _in_each)[rng.integers(2)](pair, true, rng)
        if sentence is not None:
            return sentence


def _in_one(pair: tuple[Scene, Scene], true: bool, rng: np.random.Generator) -> str | None:
    described = _of_side(pair, side := int(rng.integers(2)), true, rng)
    return described and f"there is {described} in the {('left', 'right')[side]} image"


def _in_each(pair: tuple[Scene, Scene], true: bool, rng: np.random.Generator) -> str | None:
    truths = [True, True] if true else pick(rng, ([True, False], [False, True]))
    left, right = (_of_side(pair, side, truth, rng) for side, truth in enumerate(truths))
    return left and right and f"the left image contains {left} and the right image contains {right}"


def _of_side(pair: tuple[Scene, Scene], side: int, true: bool, rng: np.random.Generator) -> str | None:
    """Something that is in the image of this side; or that is not, and often in the other; None where luck was out."""
    if true or rng.random() < 0.5:
        described = draw_description(pair[side], true, rng)
    else:
        described = draw_description(pair[1 - side], True, rng)
        if described.count(pair[side]):
            return None
    return with_article(described.words)


def _in_both(
    attributes: tuple[str, ...], pair: tuple[Scene, Scene], true: bool, rng: np.random.Generator
) -> str | None:
    first, second = pair if rng.random() < 0.5 else pair[::-1]
    candidates = [Description.of(o, attributes) for o in first.objects]
    return _said("both images contain", [d for d in candidates if bool(d.count(second)) == true], rng)


def _in_exactly_one(
    attributes: tuple[str, ...], pair: tuple[Scene, Scene], true: bool, rng: np.random.Generator
) -> str | None:
    wanted = 1 if true else pick(rng, (0, 2))
    possible = [Description(colour=c, shape=s) for c in VALUES["colour"] for s in VALUES["shape"]]
    if attributes == ("shape",):
        possible = [Description(shape=s) for s in VALUES["shape"]]
    elif wanted == 0:  # near misses: both the colour and the shape are in the pictures, but not together
        seen = [{getattr(o, name) for scene in pair for o in scene.objects} for name in _KIND]
        possible = [d for d in possible if d.colour in seen[0] and d.shape in seen[1]]
    found = [d for d in possible if sum(d.count(scene) > 0 for scene in pair) == wanted]
    return _said("exactly one image contains", found, rng)


def _said(opening: str, candidates: Sequence[Description], rng: np.random.Generator) -> str | None:
    return f"{opening} {with_article(pick(rng, candidates).words)}" if candidates else None


def _more(pair: tuple[Scene, Scene], true: bool, rng: np.random.Generator) -> str | None:
    left, right = (len(scene.objects) for scene in pair)
    if left == right:
        return None
    more, fewer = ("left", "right") if (left > right) == true else ("right", "left")
    return f"the {more} image contains more objects than the {fewer} image"


_STATEMENTS: tuple[Callable, ...]
_STATEMENTS, _STATEMENT_SHARES = zip(
    (_in_one, 0.3),
    (_in_each, 0.25),
    (partial(_in_both, ("shape",)), 0.1),
    (partial(_in_both, _KIND), 0.15),
    (partial(_in_exactly_one, ("shape",)), 0.05),
    (partial(_in_exactly_one, _KIND), 0.05),
    (_more, 0.1),
    strict=True,
)


def draw_phrase(scene: Scene, rng: np.random.Generator) -> tuple[int, str, bool]:
    """(number of an object, phrase that fits this object of the scene only, whether it says where the object is)."""
    located = _by_relation(scene) if rng.random() < 0.3 else []
    if located:
        target, phrase = pick(rng, located)
    else:
        target, description = pick(rng, unambiguous(scene, _PHRASE_FORMS))
        phrase = description.words
    return target, f"the {phrase}", bool(located)


def _by_relation(scene: Scene) -> list[tuple[int, str]]:
    """Phrases such as "star left of the blue square"; only those that need their relation, where there are any."""
    found = []
    for anchor, thing in enumerate(scene.objects):
        for description in sorted({Description(shape=o.shape) for o in scene.objects}, key=lambda d: d.words):
            among = [i for i, o in enumerate(scene.objects) if i != anchor and description.fits(o)]
            for relation in OPPOSITE:
                target = sole_neighbour(scene, relation, anchor, among)
                if target is not None:
                    phrase = f"{description.words} {relation} the {Description.of(thing, _KIND).words}"
                    found.append((description.count(scene) > 1, target, phrase))
    needed = [f for f in found if f[0]] or found
    return [(target, phrase) for _, target, phrase in needed]
