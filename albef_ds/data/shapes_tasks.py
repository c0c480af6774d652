"""Data of five downstream tasks about the pictures of Shapes World, in the reference's JSON forms.

Retrieval, question answering, entailment, reasoning over two images, and grounding. All of it follows from the scenes;
captions, some of which are wrong, are not looked at. Each task has three parts: to train on; to choose settings by
("val": training scenes of the world that no task trains on, though pre-training has seen their pictures); and to test.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from albef_ds.data.shapes_descriptions import pick
from albef_ds.data.shapes_questions import ANNOTATORS, ANSWERS, draw_answers, draw_questions
from albef_ds.data.shapes_scene import SIZES, Scene, varied_caption
from albef_ds.data.shapes_statements import LABELS, draw_another, draw_hypothesis, draw_phrase, draw_statement
from albef_ds.data.shapes_world import ShapesWorld, write_list
from albef_ds.data.whole_folder import is_made_from, whole_folder

VERSION = 3  # of these files; a change of what is asked, said or drawn raises it
_STREAM = 2  # of random numbers; 0 and 1 are the world's own
_TASKS = ("retrieval", "vqa", "entailment", "nlvr", "grounding")
# Captions, questions, hypotheses, statements, phrases for an image; captions of test images are the world's.
_EACH = {
    "train": {"retrieval": 3, "vqa": 16, "entailment": 8, "nlvr": 4, "grounding": 4},
    "val": {"retrieval": 2, "vqa": 4, "entailment": 4, "nlvr": 4, "grounding": 4},
    "test": {"vqa": 4, "entailment": 4, "nlvr": 4, "grounding": 4},
}
_SPLITS = ("train", "test", "val")
_OF_VAL = 32  # every so many training scenes of the world, one is for val; at least two in all
PHRASES = ("appearance", "location")  # splits of the test phrases; RefCOCO+ has none of the second kind
_VG_SHARE = 0.2  # of the training questions: one answer, in the form of Visual Genome's

Box = tuple[int, int, int, int]  # left, top, width, height in pixels


@dataclass(frozen=True)
class ShapesTasks:
    """Where the files are. Their image paths are relative to the folder of the ShapesWorld."""

    root: Path
    retrieval_train: Path  # a caption an entry, `image_id` says which belong to one image
    retrieval_val: Path
    retrieval_test: Path
    vqa_train: Path
    vqa_val: Path  # questions only
    vqa_val_annotations: Path  # their answers, in VQA v2's form
    vqa_test: Path
    vqa_test_annotations: Path
    answer_list: Path
    entailment_train: Path  # image paths without ".jpg", as in SNLI-VE
    entailment_val: Path
    entailment_test: Path
    nlvr_train: Path
    nlvr_val: Path
    nlvr_test: Path
    grounding_train: Path  # no boxes: grounding is learnt without them
    grounding_val: Path
    grounding_test: Path
    meta: Path  # what it was made from, of how many of each an image, and how many entries; written last

    @classmethod
    def at(cls, root: str | os.PathLike) -> ShapesTasks:
        root = Path(root)
        return cls(root, *(root / f"{name}.json" for name in list(cls.__dataclass_fields__)[1:]))


@dataclass(frozen=True)
class _Source:
    """The scenes of one part of the world."""

    split: str  # of _SPLITS
    images: tuple[str, ...]
    scenes: tuple[Scene, ...]
    seed: int  # the world's

    def each(self, task: str) -> int:
        return _EACH[self.split][task]

    def rng(self, task: str, i: int) -> np.random.Generator:
        """Random numbers of this task and scene alone: what is drawn for one changes nothing for another."""
        return np.random.default_rng((VERSION, self.seed, _STREAM, _TASKS.index(task), _SPLITS.index(self.split), i))

    def divided(self) -> tuple[_Source, _Source]:
        """(what to train on, what to choose settings by)."""
        kept = len(self.scenes) - max(2, len(self.scenes) // _OF_VAL)
        return tuple(
            replace(self, split=split, images=self.images[part], scenes=self.scenes[part])
            for split, part in (("train", slice(kept)), ("val", slice(kept, None)))
        )


def write_shapes_tasks(out: str | os.PathLike, world: ShapesWorld) -> ShapesTasks:
    """Writes the files of ShapesTasks for a world that write_shapes_world has made.

    The same world gives the same bytes. Training entries are about training scenes, test entries about test scenes. The
    folder appears complete or not at all; where `out` already holds these files it returns at once.
    Raises FileExistsError where `out` holds something else, FileNotFoundError where there is no such world, ValueError
    where it has too few images.
    """
    tasks = ShapesTasks.at(out)
    if not world.meta.is_file():
        raise FileNotFoundError(
            f"{world.meta} is missing: expected a data set made by write_shapes_world; make it first"
        )
    made_from = {"version": VERSION, "world": json.loads(world.meta.read_text(encoding="utf-8")), "each_image": _EACH}

    def is_written() -> bool:
        return is_made_from(tasks.meta, made_from, "the tasks of this shapes world", beside=("counts",))

    if is_written():
        return tasks
    seed = made_from["world"]["seed"]
    train, val = _read(world, "train", seed, at_least=4).divided()
    test = _read(world, "test", seed, at_least=2)
    with whole_folder(tasks.root, is_written) as temporary:
        temporary.mkdir()
        _write(ShapesTasks.at(temporary), world, (train, val, test), made_from)
    return tasks


def _read(world: ShapesWorld, split: str, seed: int, at_least: int) -> _Source:
    with open(world.scenes, encoding="utf-8") as file:
        records = [record for record in map(json.loads, file) if record["split"] == split]
    if len(records) < at_least:
        raise ValueError(
            f"{world.scenes} has {len(records)} {split} scenes: expected at least {at_least}, two for every part that "
            "statements about two images are made for"
        )
    scenes = tuple(Scene.from_dict(record["scene"]) for record in records)
    return _Source(split, tuple(record["image"] for record in records), scenes, seed)


def _write(tasks: ShapesTasks, world: ShapesWorld, sources: Sequence[_Source], made_from: dict) -> None:
    train, val, test = sources
    (val_questions, val_answers), (test_questions, test_answers) = (_vqa_asked(source) for source in (val, test))
    files = {
        tasks.retrieval_train: list(_retrieval(train)),
        tasks.retrieval_val: list(_retrieval_val(val)),
        tasks.vqa_train: list(_vqa_train(train)),
        tasks.vqa_val: val_questions,
        tasks.vqa_test: test_questions,
        tasks.answer_list: ANSWERS,
    }
    for source in sources:
        for task, entries in (("entailment", _entailment), ("nlvr", _nlvr), ("grounding", _grounding)):
            files[getattr(tasks, f"{task}_{source.split}")] = list(entries(source))
    for path, entries in files.items():
        write_list(path, entries)
    shutil.copyfile(world.test, tasks.retrieval_test)
    for path, answers in ((tasks.vqa_val_annotations, val_answers), (tasks.vqa_test_annotations, test_answers)):
        part = path.stem.removeprefix("vqa_").removesuffix("_annotations")
        official = {"data_type": "shapes world", "data_subtype": part, "annotations": answers}
        path.write_text(json.dumps(official) + "\n", encoding="utf-8")
    counts = {path.stem: len(entries) for path, entries in files.items()}
    counts |= {tasks.vqa_val_annotations.stem: len(val_answers), tasks.vqa_test_annotations.stem: len(test_answers)}
    counts |= {tasks.retrieval_test.stem: len(test.images)}
    tasks.meta.write_text(json.dumps({**made_from, "counts": counts}, indent=1) + "\n", encoding="utf-8")


def _retrieval(source: _Source) -> Iterator[dict]:
    for i, (image, scene) in enumerate(zip(source.images, source.scenes, strict=True)):
        rng = source.rng("retrieval", i)
        for _ in range(source.each("retrieval")):
            yield {"image": image, "caption": varied_caption(scene, rng), "image_id": Path(image).stem}


def _retrieval_val(source: _Source) -> Iterator[dict]:
    for i, (image, scene) in enumerate(zip(source.images, source.scenes, strict=True)):
        rng = source.rng("retrieval", i)
        yield {"image": image, "caption": [varied_caption(scene, rng) for _ in range(source.each("retrieval"))]}


def _vqa_train(source: _Source) -> Iterator[dict]:
    each = source.each("vqa")
    for i, (image, scene) in enumerate(zip(source.images, source.scenes, strict=True)):
        rng = source.rng("vqa", i)
        for k, question in enumerate(draw_questions(scene, each, rng)):
            answers = draw_answers(question, rng)
            vg = rng.random() < _VG_SHARE
            yield {
                "image": image,
                "dataset": "vg" if vg else "vqa",
                "question": question.text,
                "answer": question.answer if vg else answers,
                "question_id": i * each + k,
            }


def _vqa_asked(source: _Source) -> tuple[list[dict], list[dict]]:
    """(questions, annotations of VQA v2's form in the same order)."""
    questions, annotations, each = [], [], source.each("vqa")
    for i, (image, scene) in enumerate(zip(source.images, source.scenes, strict=True)):
        rng = source.rng("vqa", i)
        for question in draw_questions(scene, each, rng):
            number = len(questions)
            questions.append({"image": image, "dataset": "vqa", "question": question.text, "question_id": number})
            given = draw_answers(question, rng)
            annotations.append(
                {
                    "question_id": number,
                    "image_id": i,
                    "question_type": question.question_type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {
                            "answer_id": a + 1,
                            "answer": given[a],
                            "answer_confidence": "yes" if given[a] == question.answer else "maybe",
                        }
                        for a in range(ANNOTATORS)
                    ],
                }
            )
    return questions, annotations


def _entailment(source: _Source) -> Iterator[dict]:
    each = source.each("entailment")
    for i, (image, scene) in enumerate(zip(source.images, source.scenes, strict=True)):
        rng = source.rng("entailment", i)
        for k in range(each):
            label = LABELS[(i * each + k) % len(LABELS)]
            sentence = draw_hypothesis(scene, label, rng)
            yield {"image": image.removesuffix(".jpg"), "sentence": sentence, "label": label}


def _nlvr(source: _Source) -> Iterator[dict]:
    """In training all statements of a scene are about the same pair: they can then share the reading of its images."""
    for i in range(len(source.scenes)):
        rng = source.rng("nlvr", i)
        for k in range(source.each("nlvr")):
            true = (i + k) % 2 == 0
            if k == 0 or source.split != "train":
                pair, sentence = draw_statement(source.scenes, i, true, rng)
            else:
                sentence = draw_another(tuple(source.scenes[j] for j in pair), true, rng)
            yield {"images": [source.images[j] for j in pair], "sentence": sentence, "label": str(true)}


def _grounding(source: _Source) -> Iterator[dict]:
    each = source.each("grounding")
    for i, (image, scene) in enumerate(zip(source.images, source.scenes, strict=True)):
        rng = source.rng("grounding", i)
        for k in range(each):
            target, text, located = draw_phrase(scene, rng)
            entry = {"image": image, "text": text, "ref_id": i * each + k}
            if source.split != "train":
                entry |= {
                    "box": _corner_and_sides(scene.objects[target].box),
                    "width": scene.image_size,
                    "height": scene.image_size,
                    "split": PHRASES[located],
                    "proposals": _proposals(scene, rng),
                }
            yield entry


def _proposals(scene: Scene, rng: np.random.Generator) -> list[Box]:
    """What a detector might find: every object a pixel or two off, and two places with mostly background, shuffled."""
    most = 2 if scene.image_size >= 64 else 1
    boxes = []
    for thing in scene.objects:
        left, top, right, bottom = (
            int(np.clip(edge + rng.integers(-most, most + 1), 0, scene.image_size)) for edge in thing.box
        )
        boxes.append((left, top, right - left, bottom - top))
    while len(boxes) < len(scene.objects) + 2:
        low, high = (round(share * scene.image_size) for share in SIZES[pick(rng, tuple(SIZES))])
        width, height = (int(side) for side in rng.integers(low, high + 1, size=2))
        left, top = (int(rng.integers(scene.image_size - side + 1)) for side in (width, height))
        box = (left, top, width, height)
        if all(_overlap(box, _corner_and_sides(thing.box)) < 0.3 for thing in scene.objects):
            boxes.append(box)
    return [boxes[i] for i in rng.permutation(len(boxes))]


def _corner_and_sides(box: tuple[int, int, int, int]) -> Box:
    left, top, right, bottom = box
    return left, top, right - left, bottom - top


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)
