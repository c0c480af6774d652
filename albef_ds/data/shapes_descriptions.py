"""Descriptions of a scene's objects: which of them a few words fit, and words that fit one of them or just fail to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from albef_ds.data.shapes_scene import COLOURS, SHAPES, SIZES, Scene, SceneObject

T = TypeVar("T")
VALUES = {"size": tuple(SIZES), "colour": tuple(COLOURS), "shape": SHAPES}  # of each attribute


@dataclass(frozen=True)
class Description:
    """What an object is like; None where that is left open."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    @classmethod
    def of(cls, thing: SceneObject, attributes: Sequence[str]) -> Description:
        return cls(**{name: getattr(thing, name) for name in attributes})

    @property
    def words(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape or "object") if word)

    def fits(self, thing: SceneObject) -> bool:
        return all(getattr(self, name) in (None, getattr(thing, name)) for name in VALUES)

    def count(self, scene: Scene) -> int:
        """How many of the scene's objects it fits."""
        return sum(map(self.fits, scene.objects))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def unambiguous(scene: Scene, attribute_sets: Sequence[Sequence[str]]) -> list[tuple[int, Description]]:
    """(object, description by one of these sets of attributes) wherever the description fits that object only."""
    pairs = [(i, Description.of(o, names)) for i, o in enumerate(scene.objects) for names in attribute_sets]
    return [(i, description) for i, description in pairs if description.count(scene) == 1]


def draw_description(scene: Scene, true: bool, rng: np.random.Generator) -> Description:
    """Colour and shape, at times size: of an object that is there, or one attribute away from such an object.

    One that is not true fits no object. Both are worded alike: size is named only where the scene has both, and each is
    then named equally often; colours and shapes are alike by the scenes' symmetry.
    """
    sized = len({o.size for o in scene.objects}) == 2 and rng.random() < 0.5
    names = ("size", "colour", "shape") if sized else ("colour", "shape")
    candidates = [Description.of(o, names) for o in scene.objects]
    if not true:
        changed = pick(rng, names)
        candidates = [replace(d, **{changed: value}) for d in candidates for value in VALUES[changed]]
        candidates = [d for d in candidates if not d.count(scene)]
    if sized:
        size = pick(rng, VALUES["size"])
        candidates = [d for d in candidates if d.size == size]
    return pick(rng, candidates)


def sole_neighbour(scene: Scene, relation: str, anchor: int, among: Sequence[int] | None = None) -> int | None:
    """The only object (of `among`) that is in this relation to the anchor.

    None where there is none, where there are several, and where another lies in that direction at least diagonally:
    a reader might mean that one.
    """
    others = [i for i in (range(len(scene.objects)) if among is None else among) if i != anchor]
    there = [i for i in others if _lies(scene.objects[i], relation, scene.objects[anchor])]
    return there[0] if len(there) == 1 and scene.relation(there[0], anchor) == relation else None


def _lies(thing: SceneObject, relation: str, anchor: SceneObject) -> bool:
    (x, y), (ax, ay) = thing.centre, anchor.centre
    return {"left of": x < ax, "right of": x > ax, "above": y < ay, "below": y > ay}[relation]
