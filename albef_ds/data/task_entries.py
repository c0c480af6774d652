"""Reads the reference's JSON of the fine-tuning tasks into typed entries.

retrieval    {"image": path, "caption": text, "image_id": id}
grounding    {"image": path, "text": text}                                          one id an image
vqa          {"image": path, "dataset": "vqa", "question": text, "answer": [texts], "question_id": number}
             {"image": path, "dataset": "vg", "question": text, "answer": text, "question_id": number}
entailment   {"image": path, "sentence": text, "label": "entailment" | "neutral" | "contradiction"}
                 (".jpg" is appended to a path without an ending)
nlvr         {"images": [path, path], "sentence": text, "label": "True" | "False"}
"""

from __future__ import annotations

import json
import os
import reprlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from albef_ds.data.annotations import AnnotationError, kind_of, load_list

ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")  # their places are the reference's class numbers
NLVR_LABELS = ("False", "True")


@dataclass(frozen=True)
class CaptionEntry:
    """An image and a text that is right for all images of the same id."""

    images: tuple[str]  # as written, relative to root
    root: str
    text: str
    id: int


@dataclass(frozen=True)
class QuestionEntry:
    """A question and, in training, its different answers with their weights."""

    images: tuple[str]
    root: str
    text: str
    question_id: int
    answers: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class LabelledEntry:
    """A sentence about one image, or two, and the number of its class; -1 where the file does not say."""

    images: tuple[str, ...]
    root: str
    text: str
    label: int


@dataclass(frozen=True)
class ReferringEntry:
    """A phrase and where it points. Boxes are x, y, width, height in pixels of the image."""

    images: tuple[str]
    root: str
    text: str
    ref_id: int
    box: tuple[float, ...]
    width: int
    height: int
    split: str
    proposals: tuple[tuple[float, ...], ...]  # boxes to choose from, found by a detector; may be none


Entry = TypeVar("Entry", CaptionEntry, QuestionEntry, LabelledEntry, ReferringEntry)


@dataclass(frozen=True, eq=False)
class Entries(Sequence, Generic[Entry]):
    """Entries in the order of their files, kept as JSON in one buffer: millions of Python objects would be copied into
    every forked loader worker."""

    kind: type[Entry]
    buffer: np.ndarray  # [bytes] uint8
    ends: np.ndarray  # [N + 1] int64
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (key, reason)

    def __len__(self) -> int:
        return self.ends.size - 1

    def __getitem__(self, index: int) -> Entry:
        if not -len(self) <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        index %= len(self)
        values = json.loads(self.buffer[self.ends[index] : self.ends[index + 1]].tobytes())
        return self.kind(**{k: _tuples(v) for k, v in values.items()})


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class EntryError(ValueError):
    """What is wrong with one entry."""


Parse = Callable[[Mapping, str], Entry]  # an entry of the file and the root of its images


def read_entries(
    files: str | os.PathLike | Iterable[str | os.PathLike], parse: Parse, roots: Mapping[str, str | None]
) -> Entries:
    """Reads a task's annotation files.

    Args:
        parse: makes a typed entry of a JSON object, or raises EntryError; one of this module.
        roots: what image paths are relative to, by the entries' "dataset"; "" for all others; None: the file's folder.

    Entries that cannot be used are left out and listed in `.rejected`.
    Raises AnnotationError where a file is missing or no such list, or where no entry at all is usable.
    """
    paths = [Path(f) for f in ([files] if isinstance(files, str | os.PathLike) else files)]
    buffer, ends, rejected, kind = bytearray(), array("q", [0]), [], None
    for path in paths:
        for i, entry in enumerate(load_list(path)):
            try:
                if not isinstance(entry, Mapping):
                    raise EntryError(f"expected an object, found {kind_of(entry)}")
                root = roots.get(str(entry.get("dataset", "")), roots.get("")) or path.parent
                parsed = parse(entry, os.path.abspath(root))
            except EntryError as error:
                rejected.append((f"{path.name}#{i}", f"{path}, entry {i}: {error}"))
                continue
            kind = type(parsed)
            buffer += json.dumps(asdict(parsed)).encode("ascii")
            ends.append(len(buffer))
    if kind is None:
        names = ", ".join(map(str, paths)) or "no file at all"
        reasons = "; ".join(reason for _, reason in rejected[:3]) or "the list is empty"
        raise AnnotationError(f"no usable entry in {names}: {reasons}")
    return Entries(kind, np.frombuffer(buffer, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64), rejected)


def captions_by_id() -> Parse:
    """Retrieval's training files. Ids may be anything; equal ones get equal numbers, over all files."""
    numbers: dict[str, int] = {}

    def parse(entry: Mapping, root: str) -> CaptionEntry:
        if "image_id" not in entry:
            raise EntryError('"image_id" is missing: it says which captions belong to the same image')
        number = numbers.setdefault(json.dumps(entry["image_id"]), len(numbers))
        return CaptionEntry((_text(entry, "image"),), root, _text(entry, "caption"), number)

    return parse


def phrases() -> Parse:
    """Grounding's training files: all phrases about an image are right for it; its name is its id."""
    numbers: dict[str, int] = {}

    def parse(entry: Mapping, root: str) -> CaptionEntry:
        image = _text(entry, "image")
        number = numbers.setdefault(image.split("/")[-1], len(numbers))
        return CaptionEntry((image,), root, _text(entry, "text"), number)

    return parse


def questions(vg_weight: float = 0.5, answered: bool = True) -> Parse:
    """VQA's files. vg_weight: of the one answer of a Visual Genome question. answered: whether answers are needed."""

    def parse(entry: Mapping, root: str) -> QuestionEntry:
        image, question = _text(entry, "image"), _text(entry, "question")
        number = entry.get("question_id", -1)
        if not isinstance(number, int) or isinstance(number, bool):
            raise EntryError(f'"question_id" is {kind_of(number)}: expected a whole number')
        answer = entry.get("answer")
        if answer is None and not answered:
            return QuestionEntry((image,), root, question, number, (), ())
        if isinstance(answer, str) and answer.strip():
            return QuestionEntry((image,), root, question, number, (answer,), (vg_weight,))
        given = [a for a in answer if isinstance(a, str) and a.strip()] if isinstance(answer, list) else []
        if not given:
            raise EntryError('"answer" holds no text: expected a text, or a list of what the annotators said')
        shares = {a: count / len(given) for a, count in Counter(given).items()}
        return QuestionEntry((image,), root, question, number, tuple(shares), tuple(shares.values()))

    return parse


def hypotheses(labelled: bool = True) -> Parse:
    """Visual entailment's files."""

    def parse(entry: Mapping, root: str) -> LabelledEntry:
        image = _text(entry, "image")
        if not image.lower().endswith((".jpg", ".jpeg", ".png")):
            image += ".jpg"
        label = _label(entry, ENTAILMENT_LABELS, labelled)
        return LabelledEntry((image,), root, _text(entry, "sentence"), label)

    return parse


def statements(labelled: bool = True) -> Parse:
    """NLVR2's files."""

    def parse(entry: Mapping, root: str) -> LabelledEntry:
        images = entry.get("images")
        if not isinstance(images, list) or len(images) != 2 or not all(isinstance(i, str) and i for i in images):
            raise EntryError('"images" must be a list of two paths')
        return LabelledEntry(tuple(images), root, _text(entry, "sentence"), _label(entry, NLVR_LABELS, labelled))

    return parse


def referring() -> Parse:
    """Grounding's test files, as albef_ds.data.refcoco writes them."""

    def parse(entry: Mapping, root: str) -> ReferringEntry:
        width, height = entry.get("width"), entry.get("height")
        if not all(isinstance(n, int) and _is_pixels(n) and n > 0 for n in (width, height)):
            raise EntryError('"width" and "height" must be the image\'s size in pixels')
        proposals = entry.get("proposals", [])
        if not isinstance(proposals, list):
            raise EntryError('"proposals" must be a list of boxes')
        return ReferringEntry(
            (_text(entry, "image"),),
            root,
            _text(entry, "text"),
            entry.get("ref_id", -1),
            _box(entry.get("box"), "box"),
            width,
            height,
            str(entry.get("split", "test")),
            tuple(_box(box, "proposals") for box in proposals),
        )

    return parse


def _box(value, key: str) -> tuple[float, ...]:
    if not (isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_pixels, value))):
        raise EntryError(f'"{key}": expected [x, y, width, height], found {reprlib.repr(value)}')
    return tuple(value)


def _is_pixels(value) -> bool:
    """Python's JSON also reads NaN, Infinity and whole numbers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _text(entry: Mapping, key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise EntryError(f'"{key}" is missing' if value is None else f'"{key}" is {kind_of(value)} without any text')
    return value


def _label(entry: Mapping, labels: Sequence[str], needed: bool) -> int:
    label = entry.get("label")
    if label is None and not needed:
        return -1
    if str(label) not in labels:  # NLVR2's also come as true and false
        raise EntryError(f'"label" is {reprlib.repr(label)}: expected one of {", ".join(labels)}')
    return labels.index(str(label))
