import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from albef_ds.data.annotations import read_pairs
from albef_ds.data.images import decode_image
from albef_ds.data.shapes_scene import (
    BACKGROUND_COLOURS,
    COLOURS,
    SHAPES,
    SIZES,
    TASK_WORDS,
    Scene,
    SceneObject,
    draw_scene,
    full_caption,
    varied_caption,
)
from albef_ds.data.shapes_world import render, write_shapes_world
from albef_ds.data.tokenizer import load_tokenizer

SMALL = {"images": 30, "test_images": 6, "size": 48}


def digest(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return [(str(p.relative_to(root)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def scenes_of(world):
    return [json.loads(line) for line in world.scenes.read_text().splitlines()]


def test_what_is_written(world):
    train, test = read_pairs(world.train), read_pairs(world.test)
    assert (len(train), len(test)) == (60, 12) and not train.rejected and not test.rejected
    assert all(len(a.captions) == 2 for a in train) and all(len(a.captions) == 1 for a in test)
    assert decode_image(train[0].image).size == (48, 48)
    assert len(scenes_of(world)) == 72 and len(list((world.root / "images").iterdir())) == 72


def test_same_arguments_same_bytes_in_any_process(tmp_path):
    expected = digest(write_shapes_world(tmp_path / "a", **SMALL).root)
    code = f"import sys; from albef_ds.data.shapes_world import *; write_shapes_world(sys.argv[1], **{SMALL})"
    env = {**os.environ, "PYTHONHASHSEED": "17"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True, env=env)
    assert digest(tmp_path / "b") == expected
    assert digest(write_shapes_world(tmp_path / "c", **SMALL, seed=1).root) != expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing temporary remains


def test_a_complete_data_set_is_kept_and_anything_else_refused(tmp_path):
    world = write_shapes_world(tmp_path / "a", **SMALL)
    before = world.train.stat().st_mtime_ns
    assert write_shapes_world(str(tmp_path / "a"), **SMALL) == world
    assert world.train.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="holds something else.*seed is 0 there, 1 is wanted; delete"):
        write_shapes_world(tmp_path / "a", **SMALL, seed=1)
    world.meta.unlink()
    with pytest.raises(FileExistsError, match="delete it or choose another"):
        write_shapes_world(tmp_path / "a", **SMALL)
    (tmp_path / "empty").mkdir()
    assert write_shapes_world(tmp_path / "empty", **SMALL).meta.is_file()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("albef_ds.data.shapes_world.train_wordpiece", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_shapes_world(tmp_path / "a", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_the_later_takes_the_earliers(tmp_path, monkeypatch):
    import albef_ds.data.shapes_world as module

    write = module._write

    def and_meanwhile_another(temporary, arguments):
        write(temporary, arguments)
        write(module.ShapesWorld.at(tmp_path / "a"), arguments)

    monkeypatch.setattr(module, "_write", and_meanwhile_another)
    assert write_shapes_world(tmp_path / "a", **SMALL).meta.is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"noise": 1.5}, {"size": 8}, {"test_images": 5000}, {"seed": -1}])
def test_arguments_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        write_shapes_world(tmp_path / "a", **wrong)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [draw_scene(rng, 96) for _ in range(400)]


def test_scenes_are_as_described(scenes):
    assert {len(s.objects) for s in scenes} == {2, 3, 4}
    for scene in scenes:
        assert scene.relations() and len({(o.colour, o.shape) for o in scene.objects}) == len(scene.objects)
        for i, thing in enumerate(scene.objects):
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96 and right - left == bottom - top
            for other in scene.objects[:i]:
                apart = left >= other.box[2] or right <= other.box[0] or top >= other.box[3] or bottom <= other.box[1]
                assert apart
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_relations_follow_the_boxes():
    def thing(shape, left, top):
        return SceneObject("red", shape, "small", (left, top, left + 10, top + 10))

    scene = Scene(96, "gray", "plain", (thing("star", 0, 40), thing("circle", 50, 45), thing("square", 5, 80)), 0)
    assert scene.relations() == {
        **{(0, 1): "left of", (1, 0): "right of"},
        **{(0, 2): "above", (2, 0): "below"},
    }  # circle and square lie diagonally


def says_true_things(scene, caption):
    """Reads a caption back: every "a SIZE COLOUR SHAPE [relation] …" in it must hold in the scene."""
    words = caption.replace("to the ", "").replace("there is ", "").replace("a picture of ", "").split()
    if "on" in words:
        at = words.index("on")
        assert words[at + 2 : at + 4] == [scene.background_kind, scene.background_colour]
        words = words[:at]
    index = {tuple(o.words.split()): i for i, o in enumerate(scene.objects)}
    named, relations = [], []
    for part in " ".join(words).split(" and "):
        tokens = part.split()
        first = index[tuple(tokens[1:4])]
        named.append(first)
        if len(tokens) > 4:
            second = index[tuple(tokens[-3:])]
            named.append(second)
            relation = " ".join(tokens[4:-4])
            assert scene.relation(first, second) == relation
            relations.append(relation)
    assert sorted(named) == list(range(len(scene.objects))) and relations


def test_captions_are_true_and_complete_and_short_enough(scenes, tokenizer):
    rng = np.random.default_rng(1)
    forms = set()
    for scene in scenes:
        for caption in (full_caption(scene, rng), varied_caption(scene, rng), varied_caption(scene, rng)):
            says_true_things(scene, caption)
            forms.add(
                (
                    caption.startswith("there is"),
                    caption.startswith("a picture"),
                    "to the" in caption,
                    "on a" in caption,
                )
            )
        assert len(tokenizer.encode([full_caption(scene, rng)], 99)[0]) <= 25
    assert len(forms) > 8


def test_pictures_show_what_is_described(scenes):
    for scene in scenes[:60]:
        pixels = np.asarray(render(scene)).astype(int)
        assert np.array_equal(pixels, np.asarray(render(scene)))
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            x, y = (left + right) // 2, (top + bottom) // 2  # the middle belongs to every shape
            nearest = min(COLOURS, key=lambda c: np.abs(pixels[y, x] - COLOURS[c]).sum())
            assert nearest == thing.colour


@pytest.mark.parametrize("noise, low, high", [(0.0, 0, 0), (0.3, 0.2, 0.4), (1.0, 1, 1)])
def test_noise_is_in_the_training_captions_only(tmp_path, noise, low, high):
    world = write_shapes_world(tmp_path / "a", images=150, test_images=6, size=32, noise=noise)
    records = scenes_of(world)
    flags = [flag for r in records if r["split"] == "train" for flag in r["noise"]]
    assert low <= np.mean(flags) <= high
    for record in records:
        scene = Scene.from_dict(record["scene"])
        for caption, noisy in zip(record["captions"], record["noise"], strict=True):
            if not noisy:
                says_true_things(scene, caption)
        assert record["split"] == "train" or record["noise"] == [False]


def test_test_scenes_are_new_and_told_apart_by_their_captions(tmp_path):
    world = write_shapes_world(tmp_path / "a", images=400, test_images=256, size=32)
    split = {"train": [], "test": []}
    for record in scenes_of(world):
        split[record["split"]].append(Scene.from_dict(record["scene"]).contents)
    assert not set(split["train"]) & set(split["test"])
    captions = [a.captions[0] for a in read_pairs(world.test)]
    assert len(set(captions)) == 256
    assert not any(a <= b for i, a in enumerate(split["test"]) for j, b in enumerate(split["test"]) if i != j)


def test_the_vocabulary_knows_every_word_whole(world):
    tokenizer = load_tokenizer(world.vocab)
    assert tokenizer.vocab_size <= 384
    for annotation in read_pairs(world.test):
        [ids] = tokenizer.encode(annotation.captions, 99)
        assert tokenizer.unk_id not in ids and len(ids) == 1 + len(annotation.captions[0].split())


def test_the_vocabulary_of_the_smallest_world_knows_the_words_of_the_tasks(tmp_path):
    world = write_shapes_world(tmp_path / "a", images=1, test_images=1, size=32)
    tokenizer = load_tokenizer(world.vocab)
    for word in (*TASK_WORDS, *COLOURS, *BACKGROUND_COLOURS, *SHAPES, *SIZES):
        [ids] = tokenizer.encode([word], 99)
        assert len(ids) == 2 and tokenizer.unk_id not in ids, word
