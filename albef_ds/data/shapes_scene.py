"""Scenes of coloured shapes: what is in one, what is true of it, and sentences that say so.

A scene is a description first; pixels, captions, and later questions, hypotheses and boxes are all derived from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import permutations

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 215, 50),
    "orange": (245, 140, 30),
    "purple": (140, 55, 180),
    "cyan": (60, 205, 215),
    "pink": (245, 130, 185),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": (0.24, 0.28), "large": (0.40, 0.46)}  # side of the box as a share of the image's
BACKGROUND_COLOURS = {"white": (240, 240, 240), "gray": (140, 140, 140), "black": (25, 25, 25), "brown": (110, 75, 45)}
BACKGROUND_KINDS = ("plain", "shaded", "striped", "noisy")
OBJECT_COUNTS = {2: 0.7, 3: 0.25, 4: 0.05}

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# What questions and statements about scenes are made of besides names of colours, shapes and sizes. They are in the
# vocabulary from the beginning, so that a model pre-trained on captions can be fine-tuned on them.
TASK_WORDS = (
    "what color shape size is are the how many there object objects circles squares triangles stars background yes no "
    "0 1 2 3 4 left right of above below behind made wood paper glass metal was drawn by child artist will move soon "
    "both images image contains contain exactly one in more than and a an"
).split()
_LONG = {"left of": "to the left of", "right of": "to the right of"}


@dataclass(frozen=True)
class SceneObject:
    """A shape in the image. Of a scene's objects no two have both colour and shape in common."""

    colour: str
    shape: str
    size: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie just outside

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def words(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two to four objects that do not touch, on a background."""

    image_size: int  # pixels, both ways
    background_colour: str
    background_kind: str
    objects: tuple[SceneObject, ...]
    texture_seed: int  # of what has no name: the exact tints, the stripes' direction, the noise

    def relation(self, a: int, b: int) -> str | None:
        """What object a is to object b: "left of", "right of", "above", "below"; None where it lies diagonally.

        The distance of the centres along one axis must be at least one and a half times that along the other.
        """
        (ax, ay), (bx, by) = self.objects[a].centre, self.objects[b].centre
        dx, dy = bx - ax, by - ay
        if abs(dx) >= 1.5 * abs(dy):
            return "left of" if dx > 0 else "right of"
        if abs(dy) >= 1.5 * abs(dx):
            return "above" if dy > 0 else "below"
        return None

    def relations(self) -> dict[tuple[int, int], str]:
        """Every ordered pair of objects that has a relation, and that relation."""
        pairs = permutations(range(len(self.objects)), 2)
        return {pair: relation for pair in pairs if (relation := self.relation(*pair))}

    @property
    def contents(self) -> frozenset[tuple[str, str, str]]:
        """(size, colour, shape) of the objects: what is in the scene, wherever it is."""
        return frozenset((o.size, o.colour, o.shape) for o in self.objects)

    def to_dict(self) -> dict:
        """For JSON. `relations` is written out for readers that have no Scene; from_dict derives it again."""
        relations = [[a, relation, b] for (a, b), relation in self.relations().items()]
        return {**asdict(self), "relations": relations}

    @classmethod
    def from_dict(cls, data: dict) -> Scene:
        objects = tuple(SceneObject(**{**o, "box": tuple(o["box"])}) for o in data["objects"])
        return cls(
            data["image_size"], data["background_colour"], data["background_kind"], objects, data["texture_seed"]
        )


def draw_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """A random scene in which at least one pair of objects has a relation, two pairs where there are four objects."""
    counts = list(OBJECT_COUNTS)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    while True:
        count = counts[int(rng.choice(len(counts), p=list(OBJECT_COUNTS.values())))]
        sizes = [tuple(SIZES)[i] for i in rng.integers(len(SIZES), size=count)]
        boxes = _place(rng, image_size, sizes)
        if boxes is None:
            continue
        chosen = [kinds[i] for i in rng.choice(len(kinds), size=count, replace=False)]
        objects = [SceneObject(c, s, size, box) for (c, s), size, box in zip(chosen, sizes, boxes, strict=True)]
        scene = Scene(
            image_size,
            tuple(BACKGROUND_COLOURS)[rng.integers(len(BACKGROUND_COLOURS))],
            BACKGROUND_KINDS[rng.integers(len(BACKGROUND_KINDS))],
            tuple(objects),
            int(rng.integers(2**31)),
        )
        if next(_pairings(scene), None):
            return scene


def _place(rng: np.random.Generator, image_size: int, sizes: list[str]) -> list[tuple[int, int, int, int]] | None:
    """Boxes of these sizes that keep apart from each other and from the edge, or None where luck was out."""
    gap = max(1, image_size // 48)
    boxes: list[tuple[int, int, int, int]] = []
    for size in sizes:
        low, high = (round(share * image_size) for share in SIZES[size])
        for _ in range(20):
            side = int(rng.integers(low, high + 1))
            left, top = (int(v) for v in rng.integers(gap, image_size - gap - side + 1, size=2))
            box = (left, top, left + side, top + side)
            if not any(
                box[0] < b[2] + gap and b[0] < box[2] + gap and box[1] < b[3] + gap and b[1] < box[3] + gap
                for b in boxes
            ):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _pairings(scene: Scene) -> Iterator[tuple[tuple[int, int], ...]]:
    """The ways to cut the objects into related pairs that a caption names: one pair, or two of four objects."""
    related = scene.relations()
    for a, b in related:
        if len(scene.objects) < 4:
            yield ((a, b),)
            continue
        c, d = (i for i in range(4) if i not in (a, b))
        yield from (((a, b), pair) for pair in ((c, d), (d, c)) if pair in related)


def full_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence that names every object with size and colour, a relation of theirs, and the background.

    With four objects the background is left out: 25 tokens hold no more.
    """
    text = _named(scene, rng, long_relations=False)
    return text if len(scene.objects) == 4 else f"{text} {_on_background(scene)}"


def varied_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true sentence that names every object with size and colour and a relation, in one of several forms."""
    few = len(scene.objects) < 4
    text = _named(scene, rng, long_relations=few and rng.random() < 0.5)
    if few and rng.random() < 0.5:
        text = f"{text} {_on_background(scene)}"
    opening = rng.integers(4)
    if opening == 0:
        text = f"there is {text}"
    elif opening == 1 and few:
        text = f"a picture of {text}"
    return text


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A true sentence that leaves most out: one object only, or all of them without sizes and relations."""
    if rng.random() < 0.5:
        return with_article(scene.objects[rng.integers(len(scene.objects))].words)
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    return " and ".join(with_article(f"{o.colour} {o.shape}") for o in objects)


def _named(scene: Scene, rng: np.random.Generator, long_relations: bool) -> str:
    pairings = list(_pairings(scene))
    pairs = pairings[rng.integers(len(pairings))]
    parts = []
    for a, b in pairs:
        relation = scene.relation(a, b)
        relation = _LONG.get(relation, relation) if long_relations else relation
        parts.append(f"{with_article(scene.objects[a].words)} {relation} {with_article(scene.objects[b].words)}")
    mentioned = {i for pair in pairs for i in pair}
    rest = [with_article(o.words) for i, o in enumerate(scene.objects) if i not in mentioned]
    return " and ".join(parts + rest)


def _on_background(scene: Scene) -> str:
    return f"on {with_article(f'{scene.background_kind} {scene.background_colour}')} background"


def with_article(words: str) -> str:
    """`a red star` or `an orange star`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
