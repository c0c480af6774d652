"""Reads RefCOCO, RefCOCO+ and RefCOCOg as they are distributed, and writes the JSON lists of grounding.

A folder holds refs(SPLIT_BY).p, a pickle made by Python 2, and instances.json, COCO's annotations of those images. The
reference reads the same two while evaluating (refTools/refer_python3.py); here that is done once, and safely: a pickle
can run any program, so only plain containers, texts and numbers are admitted.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from albef_ds.data.annotations import AnnotationError
from albef_ds.data.files import write_atomically

IMAGE_TEMPLATE = "train2014/{file_name}"  # below COCO's folder of images

Box = tuple[float, float, float, float]  # x, y, width, height in pixels


@dataclass(frozen=True)
class Referred:
    """One object of an image, and the sentences that refer to it."""

    ref_id: int
    image: str  # path made from the image template
    sentences: tuple[str, ...]  # at least one, none blank
    box: Box
    width: int  # of the image, pixels
    height: int
    split: str  # "train", "val", "testA", "testB"; "test" where SPLIT_BY is umd
    proposals: tuple[Box, ...]  # a detector's boxes of the image; empty without detections


@dataclass(frozen=True)
class RefcocoCounts:
    """What a conversion wrote."""

    entries: dict[str, int]  # file name: sentences
    blank: int  # sentences without any text, left out
    without_proposals: int  # sentences of the test files whose image has no detection


def read_refcoco(
    folder: str | os.PathLike,
    split_by: str = "unc",
    detections: str | os.PathLike | None = None,
    image_template: str = IMAGE_TEMPLATE,
) -> list[Referred]:
    """All referred objects of a data set, in the order of its file; those without a sentence are left out.

    Args:
        folder: holds refs(SPLIT_BY).p and instances.json.
        split_by: whose division into splits: unc (RefCOCO, RefCOCO+), umd or google (RefCOCOg).
        detections: JSON of `{"image id": [[x, y, w, h, …], …]}`; what follows the four is ignored.
        image_template: makes an image's path of {file_name} and {image_id}, both as in instances.json; for COCO's later
            layout `train2017/{image_id:012d}.jpg`.

    Raises AnnotationError where a file is missing, is damaged or asks for anything but data, or where entries of the
    two do not fit together.
    """
    return _read(Path(folder), split_by, detections, image_template)[0]


def convert_refcoco(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    split_by: str = "unc",
    detections: str | os.PathLike | None = None,
    image_template: str = IMAGE_TEMPLATE,
    name: str | None = None,
) -> RefcocoCounts:
    """Writes one JSON list a split into the folder `out`, one entry a sentence.

    NAME_train.json: `{"image", "text", "ref_id"}`; every other split, NAME_SPLIT.json, also has `"box": [x, y, w, h]`,
    `"width", "height", "split"` and `"proposals": [[x, y, w, h], …]`. Each file is written whole or not at all.

    name: None: the name of `folder`. Other arguments and errors: see `read_refcoco`.
    """
    folder, out = Path(folder), Path(out)
    objects, blank = _read(folder, split_by, detections, image_template)
    splits: dict[str, list[dict]] = {}
    for referred in objects:
        splits.setdefault(referred.split, []).extend(_entries(referred))
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, entries in splits.items():
        file = f"{name or folder.resolve().name}_{split}.json"
        write_atomically(out / file, json.dumps(entries))
        counts[file] = len(entries)
    bare = sum(len(referred.sentences) for referred in objects if referred.split != "train" and not referred.proposals)
    return RefcocoCounts(entries=counts, blank=blank, without_proposals=bare)


def _entries(referred: Referred) -> Iterable[dict]:
    for text in referred.sentences:
        entry = {"image": referred.image, "text": text, "ref_id": referred.ref_id}
        if referred.split != "train":
            entry |= {
                "box": referred.box,
                "width": referred.width,
                "height": referred.height,
                "split": referred.split,
                "proposals": referred.proposals,
            }
        yield entry


def _read(
    folder: Path, split_by: str, detections: str | os.PathLike | None, image_template: str
) -> tuple[list[Referred], int]:
    """(objects, blank sentences)"""
    refs_file = folder / f"refs({split_by}).p"
    refs = _load_refs(refs_file)
    images, boxes = _load_instances(folder / "instances.json")
    proposals = {} if detections is None else _load_detections(Path(detections))
    objects, blank, seen = [], 0, set()
    room = 8 * refs_file.stat().st_size + (1 << 20)  # characters; a pickle can name one long text many times over
    for i, ref in enumerate(refs):
        where = f"{refs_file}, reference {i}"
        ref_id, ann_id, image_id = (_field(ref, key, int, where) for key in ("ref_id", "ann_id", "image_id"))
        split = _field(ref, "split", str, where)
        if not re.fullmatch("[A-Za-z]{1,40}", split):  # it becomes part of a file name
            raise AnnotationError(f"{where}: its split is {split!r:.60}, expected a word like train or testA")
        if ref_id in seen:
            raise AnnotationError(f"{where}: ref_id {ref_id} is there twice")
        seen.add(ref_id)
        if ann_id not in boxes or image_id not in images:
            raise AnnotationError(
                f"{where}: instances.json has no annotation {ann_id} or no image {image_id}; the two files must come "
                "from the same data set"
            )
        every = [_field(s, "sent", str, f"{where}, a sentence") for s in _field(ref, "sentences", list, where)]
        sentences = tuple(text for text in every if text.strip())
        blank += len(every) - len(sentences)
        room -= sum(map(len, sentences))
        if room < 0:
            raise AnnotationError(f"{where}: the texts so far are longer than the whole file")
        if not sentences:
            continue
        file_name, width, height = images[image_id]
        path = _image_path(image_template, file_name, image_id)
        found = proposals.get(image_id, ())
        objects.append(Referred(ref_id, path, sentences, boxes[ann_id], width, height, split, found))
    return objects, blank


def _image_path(template: str, file_name: str, image_id: int) -> str:
    try:
        return template.format(file_name=file_name, image_id=image_id)
    except (LookupError, ValueError, AttributeError) as error:
        raise AnnotationError(
            f"image template {template!r}: {error!r}; expected a path with {{file_name}} or {{image_id}}"
        ) from error


class _DataOnly(pickle._Unpickler):
    """Unpickles lists, dictionaries, texts and numbers. All else a pickle must ask for by name, and does not get.

    Python's own unpickler, not the one in C: in that one eight bytes suffice to take 64 GB (LONG_BINPUT of a large
    number makes a table of that length). It is three times slower, some seconds for RefCOCO. Byte arrays are refused:
    room for one is taken before it is known whether the file has as much. The file must be one in memory, for the same
    reason.
    """

    dispatch = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: lambda self: self.find_class("builtins", "bytearray"),
    }

    def find_class(self, module, name):
        raise _Refused(f"{module}.{name}")


class _Refused(Exception):
    pass


def _load_refs(path: Path) -> list:
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in path.parent.glob("refs(*).p"))) or "no such file"
        raise AnnotationError(f"{path} is missing; the folder has {there}: choose with split_by, or check the path")
    for encoding in ("utf-8", "latin1"):  # Python 2 did not say what its texts are; every text is valid latin1
        try:
            refs = _DataOnly(io.BytesIO(path.read_bytes()), encoding=encoding).load()
            break
        except _Refused as error:
            raise AnnotationError(
                f"{path} asks for {error}: a list of references holds nothing but containers, texts and numbers. "
                "Nothing of it was run; get the file from its original source"
            ) from None
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise AnnotationError(f"{path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # a damaged pickle raises nearly anything
            raise AnnotationError(f"{path} is no readable pickle: {type(error).__name__}: {error}") from error
    else:
        raise AnnotationError(f"{path} is no readable pickle: its texts have no encoding")
    if not isinstance(refs, list) or not refs:
        raise AnnotationError(f"{path} holds {type(refs).__name__}: expected a list of references")
    return refs


def _load_instances(path: Path) -> tuple[dict[int, tuple[str, int, int]], dict[int, Box]]:
    """({image id: (file name, width, height)}, {annotation id: box})"""
    content = _load_json(path)
    images, boxes = {}, {}
    for i, image in enumerate(_field(content, "images", list, str(path))):
        where = f"{path}, image {i}"
        size = tuple(_field(image, key, int, where) for key in ("width", "height"))
        images[_field(image, "id", int, where)] = (_field(image, "file_name", str, where), *size)
    for i, annotation in enumerate(_field(content, "annotations", list, str(path))):
        where = f"{path}, annotation {i}"
        boxes[_field(annotation, "id", int, where)] = _box(_field(annotation, "bbox", list, where), where)
    return images, boxes


def _load_detections(path: Path) -> dict[int, tuple[Box, ...]]:
    content = _load_json(path)
    try:
        return {int(key): tuple(_box(box, f"{path}, image {key}") for box in boxes) for key, boxes in content.items()}
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(f'{path}: {error}; expected {{"image id": [[x, y, w, h], …]}}') from error


def _load_json(path: Path):
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise AnnotationError(f"{path} cannot be read: {error.strerror or error}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not valid JSON: {error}") from error


def _field(entry, key: str, kind: type, where: str):
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise AnnotationError(f'{where}: "{key}" is {reprlib.repr(value):.60}, expected {kind.__name__}')
    if kind is int and not -(1 << 63) <= value < 1 << 63:
        raise AnnotationError(f'{where}: "{key}" is a number of {value.bit_length()} bits, expected at most 63')
    return value


def _box(values: Sequence, where: str) -> Box:
    numbers = list(values)[:4] if isinstance(values, list) else []
    # NaN is in no range; JSON as Python reads it may hold it.
    if len(numbers) < 4 or not all(type(v) in (int, float) and abs(v) < 1e9 for v in numbers):
        raise AnnotationError(f"{where}: box {reprlib.repr(values):.60}, expected [x, y, width, height]")
    return tuple(float(v) for v in numbers)
