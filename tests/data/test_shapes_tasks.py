import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import fields

import numpy as np
import pytest

from albef_ds.data import shapes_tasks
from albef_ds.data.captions import clean_caption
from albef_ds.data.images import decode_image
from albef_ds.data.shapes_descriptions import draw_description
from albef_ds.data.shapes_scene import Scene, SceneObject
from albef_ds.data.shapes_tasks import ShapesTasks, write_shapes_tasks
from albef_ds.data.shapes_world import write_shapes_world
from albef_ds.data.tokenizer import load_tokenizer
from tests.data.shapes_reader import RELATION, answer, label, meant, truth
from tests.data.test_shapes_world import says_true_things, scenes_of

ASKED = ("val", "test")
VAL = 1500 // 32
TRAIN = 1500 - VAL


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Wholly wrong captions: what the tasks say must not come from them."""
    root = tmp_path_factory.mktemp("tasks")
    return write_shapes_world(root / "world", images=1500, test_images=200, size=32, noise=1.0)


@pytest.fixture(scope="module")
def tasks(big):
    return write_shapes_tasks(big.root.parent / "tasks", big)


@pytest.fixture(scope="module")
def entries(tasks):
    return {f.name: json.loads(getattr(tasks, f.name).read_text()) for f in fields(tasks) if f.name != "root"}


@pytest.fixture(scope="module")
def scene_of(big):
    return {record["image"]: record["scene"] for record in scenes_of(big)}


def digest(root):
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(root.iterdir())]


def images_of(entry):
    images = entry.get("images") or [entry["image"]]
    return [image if image.endswith(".jpg") else f"{image}.jpg" for image in images]


def sentences(entries):
    for name, content in entries.items():
        for entry in content if isinstance(content, list) else []:
            if isinstance(entry, dict) and not name.startswith("retrieval"):
                yield next(entry[key] for key in ("question", "sentence", "text") if key in entry)


def answered(questions, annotations):
    """(question, right answer) of the test questions."""
    right = {a["question_id"]: a["multiple_choice_answer"] for a in annotations["annotations"]}
    return [(q["question"], right[q["question_id"]]) for q in questions]


def test_same_world_same_bytes_in_any_process(tmp_path, world):
    expected = digest(write_shapes_tasks(tmp_path / "a", world).root)
    code = (
        "import sys; from albef_ds.data.shapes_tasks import *; from albef_ds.data.shapes_world import ShapesWorld; "
        "write_shapes_tasks(sys.argv[1], ShapesWorld.at(sys.argv[2]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "17"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b"), str(world.root)], check=True, env=env)
    assert digest(tmp_path / "b") == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # nothing temporary remains


def test_another_seed_asks_other_things(tmp_path, world):
    other = write_shapes_world(tmp_path / "world", images=60, test_images=12, size=48, seed=1)
    a, b = write_shapes_tasks(tmp_path / "a", world), write_shapes_tasks(tmp_path / "b", other)
    assert a.vqa_train.read_text() != b.vqa_train.read_text()


def test_what_is_complete_is_kept_and_anything_else_refused(tmp_path, monkeypatch, world):
    tasks = write_shapes_tasks(str(tmp_path / "a"), world)
    with monkeypatch.context() as patch:  # nothing is drawn again
        patch.setattr("albef_ds.data.shapes_tasks.draw_phrase", lambda *a: 1 / 0)
        assert write_shapes_tasks(tmp_path / "a", world) == tasks == ShapesTasks.at(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setitem(shapes_tasks._EACH["train"], "vqa", 4)
        with pytest.raises(FileExistsError, match="each_image.train.vqa is 16 there, 4 is wanted; delete it or choose"):
            write_shapes_tasks(tmp_path / "a", world)
    tasks.meta.unlink()
    with pytest.raises(
        FileExistsError, match="holds something else.*meta.json is missing.*delete it or choose another"
    ):
        write_shapes_tasks(tmp_path / "a", world)
    with pytest.raises(FileExistsError, match="holds something else"):
        write_shapes_tasks(world.root, world)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, world):
    monkeypatch.setattr("albef_ds.data.shapes_tasks.draw_phrase", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes_tasks(tmp_path / "a", world)
    assert list(tmp_path.iterdir()) == []


def test_worlds_that_will_not_do(tmp_path, world):
    with pytest.raises(FileNotFoundError, match="write_shapes_world"):
        write_shapes_tasks(tmp_path / "a", type(world).at(tmp_path / "nowhere"))
    single = write_shapes_world(tmp_path / "single", images=3, test_images=1, size=32)
    with pytest.raises(ValueError, match="3 train scenes: expected at least 4"):
        write_shapes_tasks(tmp_path / "a", single)
    single = write_shapes_world(tmp_path / "single test", images=4, test_images=1, size=32)
    with pytest.raises(ValueError, match="1 test scenes: expected at least 2"):
        write_shapes_tasks(tmp_path / "a", single)


def test_the_smallest_world(tmp_path):
    world = write_shapes_world(tmp_path / "world", images=4, test_images=2, size=32)
    tasks = write_shapes_tasks(tmp_path / "tasks", world)
    for path in (tasks.nlvr_train, tasks.nlvr_val, tasks.nlvr_test):
        assert len(json.loads(path.read_text())) == 8


def test_every_file_has_the_references_form(entries, big):
    forms = {
        "retrieval_train": {"image": str, "caption": str, "image_id": str},
        **{f"retrieval_{s}": {"image": str, "caption": list} for s in ASKED},
        **{f"vqa_{s}": {"image": str, "dataset": str, "question": str, "question_id": int} for s in ASKED},
        **{f"entailment_{s}": {"image": str, "sentence": str, "label": str} for s in ("train", *ASKED)},
        **{f"nlvr_{s}": {"images": list, "sentence": str, "label": str} for s in ("train", *ASKED)},
        "grounding_train": {"image": str, "text": str, "ref_id": int},
    }
    boxed = {"image": str, "text": str, "ref_id": int, "box": list, "width": int, "height": int}
    forms |= {f"grounding_{s}": {**boxed, "split": str, "proposals": list} for s in ASKED}
    for name, form in forms.items():
        assert {tuple((key, type(value)) for key, value in e.items()) for e in entries[name]} == {tuple(form.items())}
    for entry in entries["vqa_train"]:
        assert list(entry) == ["image", "dataset", "question", "answer", "question_id"]
        assert type(entry["answer"]) is {"vqa": list, "vg": str}[entry["dataset"]]
    for split in ASKED:
        assert {e["dataset"] for e in entries[f"vqa_{split}"]} == {"vqa"}
        assert {e["split"] for e in entries[f"grounding_{split}"]} == {"appearance", "location"}
    for name, key in (("vqa_train", "question_id"), ("vqa_test", "question_id"), ("grounding_test", "ref_id")):
        assert len({e[key] for e in entries[name]}) == len(entries[name])
    assert entries["retrieval_test"] == json.loads(big.test.read_text())


def test_sizes_are_as_the_meta_says(entries):
    counts = dict(entries["meta"]["counts"])
    for split, scenes in (("val", VAL), ("test", 200)):
        annotations = entries[f"vqa_{split}_annotations"]["annotations"]
        assert counts.pop(f"vqa_{split}_annotations") == len(annotations) == 4 * scenes
    assert counts == {name: len(e) for name, e in entries.items() if isinstance(e, list)}
    for task, each in (("vqa", 16), ("entailment", 8), ("nlvr", 4), ("grounding", 4)):
        assert (counts[f"{task}_train"], counts[f"{task}_val"], counts[f"{task}_test"]) == (each * TRAIN, 4 * VAL, 800)
        recorded = entries["meta"]["each_image"]
        assert (recorded["train"][task], recorded["test"][task]) == (each, 4)
    assert [counts[f"retrieval_{s}"] for s in ("train", "val", "test")] == [3 * TRAIN, VAL, 200]
    assert entries["meta"]["each_image"]["train"]["retrieval"] == 3


def test_training_and_test_are_about_different_scenes(entries, scene_of, big):
    seen = defaultdict(set)
    for name, content in entries.items():
        split = name.rpartition("_")[2]
        if split in ("train", "val", "test") and isinstance(content[0], dict):
            images = {image for entry in content for image in images_of(entry)}
            part = "test" if split == "test" else "train"  # of the world
            assert {image.split("/")[1].split("_")[0] for image in images} == {part}, name
            seen[split] |= images
    contents = {
        split: {frozenset((o["size"], o["colour"], o["shape"]) for o in scene_of[i]["objects"]) for i in images}
        for split, images in seen.items()
    }
    assert not contents["train"] & contents["test"] and not seen["train"] & seen["val"]
    assert seen["train"] | seen["val"] | seen["test"] == set(scene_of)
    assert decode_image(big.root / min(seen["test"])).size == (32, 32)


def test_captions_are_true_and_several(entries, scene_of):
    for entry in entries["retrieval_val"]:
        assert len(entry["caption"]) == 2
        for caption in entry["caption"]:
            says_true_things(Scene.from_dict(scene_of[entry["image"]]), caption)
    said = defaultdict(list)
    for entry in entries["retrieval_train"]:
        says_true_things(Scene.from_dict(scene_of[entry["image"]]), entry["caption"])
        said[entry["image_id"]].append(entry["image"])
    assert all(len(images) == 3 and len(set(images)) == 1 for images in said.values()) and len(said) == TRAIN


def test_answers_are_right(entries, scene_of):
    disagreeing = 0
    for entry in entries["vqa_train"]:
        given = [entry["answer"]] * 10 if entry["dataset"] == "vg" else entry["answer"]
        right = answer(scene_of[entry["image"]], entry["question"])
        assert len(given) == 10 and given.count(right) >= 8 and set(given) <= set(entries["answer_list"])
        disagreeing += len(set(given)) > 1
    assert 0.15 < disagreeing / len(entries["vqa_train"]) < 0.35
    assert 0.1 < np.mean([e["dataset"] == "vg" for e in entries["vqa_train"]]) < 0.3


@pytest.mark.parametrize("split", ASKED)
def test_official_annotations_are_right(entries, scene_of, split):
    image = {q["question_id"]: q for q in entries[f"vqa_{split}"]}
    first = 0 if split == "test" else TRAIN
    for annotation in entries[f"vqa_{split}_annotations"]["annotations"]:
        question = image[annotation["question_id"]]
        right = answer(scene_of[question["image"]], question["question"])
        assert annotation["multiple_choice_answer"] == right and right in entries["answer_list"]
        given = [a["answer"] for a in annotation["answers"]]
        assert given.count(right) >= 8 and [a["answer_id"] for a in annotation["answers"]] == list(range(1, 11))
        part = "test" if split == "test" else "train"
        assert question["image"] == f"images/{part}_{first + annotation['image_id']:06d}.jpg"
        assert question["question"].startswith(annotation["question_type"])
        kind = "yes/no" if right in ("yes", "no") else "number" if right.isdigit() else "other"
        assert annotation["answer_type"] == kind


def test_labels_are_right(entries, scene_of):
    for split in ("train", *ASKED):
        for entry in entries[f"entailment_{split}"]:
            assert label(scene_of[f"{entry['image']}.jpg"], entry["sentence"]) == entry["label"], entry
        for entry in entries[f"nlvr_{split}"]:
            left, right = entry["images"]
            assert left != right
            assert str(truth(scene_of[left], scene_of[right], entry["sentence"])) == entry["label"], entry


def test_phrases_mean_one_object_and_the_box_is_its(entries, scene_of):
    for entry in entries["grounding_train"]:
        meant(scene_of[entry["image"]], entry["text"])
    for entry in (*entries["grounding_val"], *entries["grounding_test"]):
        left, top, right, bottom = meant(scene_of[entry["image"]], entry["text"])["box"]
        assert entry["box"] == [left, top, right - left, bottom - top]
        assert entry["split"] == ("location" if re.search(RELATION, entry["text"]) else "appearance")
        assert (entry["width"], entry["height"]) == (32, 32)


def test_proposals_hold_every_object_and_two_places_of_background(entries, scene_of):
    at, background_last = Counter(), 0
    for entry in entries["grounding_test"]:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in entry["proposals"]]
        assert all(0 <= x < r <= 32 and 0 <= y < b <= 32 for x, y, r, b in boxes)
        objects = [o["box"] for o in scene_of[entry["image"]]["objects"]]
        found = [max((overlap(o, b), i) for i, b in enumerate(boxes)) for o in objects]
        assert min(found)[0] > 0.5 and len({i for _, i in found}) == len(objects) == len(boxes) - 2
        rest = [b for i, b in enumerate(boxes) if i not in {i for _, i in found}]
        assert all(overlap(b, o) < 0.3 for b in rest for o in objects)
        x, y, w, h = entry["box"]
        at[max(range(len(boxes)), key=lambda i: overlap(boxes[i], (x, y, x + w, y + h)))] += 1
        background_last += boxes[-1] in rest
    assert max(at.values()) < 400 and 300 < background_last < 500  # of 800: their order tells nothing


def overlap(a, b):
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area - width * height)


def test_every_word_is_one_token_and_cleaning_changes_nothing(entries, big):
    tokenizer = load_tokenizer(big.vocab)
    texts = {*sentences(entries), *entries["answer_list"]}
    for text in texts:
        assert clean_caption(text) == text and len(text.split()) <= 20
        [ids] = tokenizer.encode([text], 99)
        assert len(ids) == 1 + len(text.split()) and tokenizer.unk_id not in ids, text


def test_labels_are_balanced(entries):
    for split in ("train", "test"):
        labels = Counter(e["label"] for e in entries[f"entailment_{split}"])
        assert len(labels) == 3 and max(labels.values()) - min(labels.values()) <= 1
        labels = Counter(e["label"] for e in entries[f"nlvr_{split}"])
        assert labels["True"] == labels["False"]
    yes_no = Counter(a for _, a in answered(entries["vqa_test"], entries["vqa_test_annotations"]) if a in ("yes", "no"))
    assert 0.4 < yes_no["yes"] / sum(yes_no.values()) < 0.6


def test_a_size_in_a_description_does_not_tell_whether_it_is_true():
    things = [("small", "red", "star"), ("small", "blue", "circle"), ("large", "pink", "square")]
    objects = tuple(SceneObject(c, s, size, (30 * i, 0, 30 * i + 20, 20)) for i, (size, c, s) in enumerate(things))
    scene, rng = Scene(96, "gray", "plain", objects, 0), np.random.default_rng(0)
    for true in (True, False):
        sizes = Counter(draw_description(scene, true, rng).size for _ in range(1000))
        assert 0.4 < sizes["small"] / (sizes["small"] + sizes["large"]) < 0.6 and sizes[None] > 400


def best_guess(train, test):
    """Accuracy on test of the commonest answer to the same text in train, else of the commonest to its first words."""
    counts = defaultdict(Counter)
    for text, right in train:
        for key in keys(text):
            counts[key][right] += 1
    guesses = [next(counts[k].most_common(1)[0][0] for k in keys(text) if k in counts) for text, _ in test]
    return np.mean([guess == right for guess, (_, right) in zip(guesses, test, strict=True)])


def keys(text):
    return text, *(" ".join(text.split()[:n]) for n in (4, 3, 2, 1)), ""


def bayes(train, test):
    """Accuracy on test of naive Bayes over the words and pairs of neighbouring words, all labels equally likely."""
    counts = defaultdict(Counter)
    for text, right in train:
        counts[right].update(features(text))
    known = set().union(*counts.values())
    cost = {r: {f: np.log(c[f] + 1) - np.log(sum(c.values()) + len(known)) for f in known} for r, c in counts.items()}
    guesses = [max(cost, key=lambda r: sum(cost[r].get(f, 0) for f in features(t))) for t, _ in test]
    return np.mean([guess == right for guess, (_, right) in zip(guesses, test, strict=True)])


def features(text):
    words = text.split()
    return {*words, *zip(words, words[1:], strict=False)}


def test_texts_alone_do_not_tell_the_answer(entries):
    majority = [
        (e["question"], e["answer"] if e["dataset"] == "vg" else Counter(e["answer"]).most_common(1)[0][0])
        for e in entries["vqa_train"]
    ]
    test = answered(entries["vqa_test"], entries["vqa_test_annotations"])
    found = {"vqa": best_guess(majority, test)}
    for task in ("entailment", "nlvr"):
        train, test = ([(e["sentence"], e["label"]) for e in entries[f"{task}_{s}"]] for s in ("train", "test"))
        found[task] = max(best_guess(train, test), bayes(train, test))
    limits = {"vqa": 0.5, "entailment": 0.7, "nlvr": 0.6}
    assert all(found[task] <= limits[task] for task in limits), found


def test_relations_are_needed_to_find_some_objects(entries, scene_of):
    asked = [e for e in entries["grounding_train"] if " the " in e["text"][4:]]
    assert 0.1 < len(asked) / len(entries["grounding_train"]) < 0.5
    shapes = [[o["shape"] for o in scene_of[e["image"]]["objects"]].count(e["text"].split()[1]) for e in asked]
    assert np.mean(np.array(shapes) > 1) > 0.1
