"""The loader of each task's recipe: deterministic, whole again after an interruption, robust against bad images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import islice

import pytest
import torch

from albef_ds.config import BatchPlan, Config, ConfigError
from albef_ds.data.annotations import AnnotationError
from albef_ds.data.batch import LabelledBatch, PairBatch, QuestionBatch
from albef_ds.data.loader import TooManyRejectsError, build_loader
from albef_ds.data.shapes_tasks import write_shapes_tasks

KINDS = {
    "retrieval": PairBatch,
    "vqa": QuestionBatch,
    "entailment": LabelledBatch,
    "nlvr": LabelledBatch,
    "grounding": PairBatch,
    "text_assignment": PairBatch,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def shapes_tasks(world, tmp_path_factory):
    return write_shapes_tasks(tmp_path_factory.mktemp("tasks") / "tasks", world)


@pytest.fixture
def recipe(world, shapes_tasks):
    def make(task: str, **data) -> Config:
        train = world.train if task == "text_assignment" else getattr(shapes_tasks, f"{task}_train")
        settings = {"train": [str(train)], "image_root": str(world.root), "workers": 0} | data
        return Config(task=task, data=settings, model={"vision": {"image_size": 16, "width": 768}}, train={"seed": 5})

    return make


def loader(config: Config, tokenizer, micro_batch: int = 6, accumulation: int = 1, rank: int = 0, ranks: int = 1):
    size = micro_batch * accumulation * ranks
    plan = BatchPlan(global_batch=size, micro_batch=micro_batch, accumulation=accumulation, world_size=ranks)
    return build_loader(config, tokenizer, plan, rank, ranks, CPU)


def take(loading, count: int, start: int = 0) -> list:
    return list(islice(loading.batches(start), count))


def assert_same(first, second) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert type(a) is type(b)
        for field in dataclasses.fields(a):
            mine, theirs = getattr(a, field.name), getattr(b, field.name)
            if dataclasses.is_dataclass(mine):
                mine, theirs = (list(vars(value).values()) for value in (mine, theirs))
            for x, y in zip(mine, theirs, strict=True) if isinstance(mine, list) else [(mine, theirs)]:
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, field.name


@pytest.mark.parametrize("task", KINDS)
def test_every_task_gets_its_batches_and_a_resumed_run_the_same(task, recipe, tokenizer):
    config = recipe(task)
    loading = loader(config, tokenizer, 4, accumulation=2)
    batches = take(loading, 12)
    assert all(type(batch) is KINDS[task] and len(batch) == 4 and not batch.rejected for batch in batches)
    assert batches[0].images.shape == ((8 if task == "nlvr" else 4), 3, 16, 16)
    assert_same(batches[6:], take(loader(config, tokenizer, 4, accumulation=2), 6, start=3))
    assert_same(batches[:5], take(loader(recipe(task, workers=2), tokenizer, 4, accumulation=2), 5))
    other = Config.model_validate(config.model_dump() | {"train": {"seed": 6}})
    assert [b.keys for b in take(loader(other, tokenizer, 4, accumulation=2), 3)] != [b.keys for b in batches[:3]]


@pytest.mark.parametrize("task", ["nlvr", "vqa"])
def test_ranks_share_a_step_as_one_rank_has_it(task, recipe, tokenizer):
    config = recipe(task)
    alone = take(loader(config, tokenizer, 6), 3)
    ranks = [take(loader(config, tokenizer, 3, rank=rank, ranks=2), 3) for rank in range(2)]
    for step, batch in enumerate(alone):
        assert ranks[0][step].keys + ranks[1][step].keys == batch.keys
        assert torch.equal(
            torch.cat([ranks[0][step].text.input_ids, ranks[1][step].text.input_ids]), batch.text.input_ids
        )


def test_a_sample_is_augmented_anew_in_every_epoch_and_equally_at_every_start(recipe, tokenizer):
    loading = loader(recipe("retrieval"), tokenizer)
    epoch = loading.steps_per_epoch

    def images(start: int) -> dict:
        return {
            (key, tuple(ids.tolist())): image
            for batch in take(loading, epoch, start)
            for key, image, ids in zip(
                batch.keys, batch.images, batch.text.input_ids.split(batch.text.cu_seqlens.diff().tolist()), strict=True
            )
        }

    first, second, again = images(0), images(epoch), images(0)
    both = first.keys() & second.keys()
    assert len(both) > 20 and sum(torch.equal(first[k], second[k]) for k in both) < len(both) / 4
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.fixture
def damaged(tmp_path, world):
    """Retrieval over twelve sound images, one that is cut short and one that is not there."""
    sound = sorted(world.root / p["image"] for p in json.loads(world.train.read_text()))[:12]
    entries = []
    for i, path in enumerate(sound):
        shutil.copy(path, tmp_path / f"good{i}.jpg")
        entries.append({"image": f"good{i}.jpg", "caption": "a circle", "image_id": i})
    (tmp_path / "cut.jpg").write_bytes(sound[0].read_bytes()[:-300])
    entries += [{"image": f"{name}.jpg", "caption": "bad", "image_id": name} for name in ("cut", "missing")]
    entries += [{"image": "good0.jpg", "caption": 7, "image_id": 0}]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    return {"train": [str(tmp_path / "train.json")], "image_root": str(tmp_path)}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_named(damaged, recipe, tokenizer, workers):
    loading = loader(recipe("retrieval", **damaged, workers=workers), tokenizer, 7)
    batches = take(loading, 4)
    for epoch in (batches[:2], batches[2:]):
        rejected = dict(r for batch in epoch for r in batch.rejected)
        assert set(rejected) == {"cut.jpg", "missing.jpg"} and rejected["missing.jpg"] == "the file does not exist"
        assert all(len(batch) == 7 and all(key.startswith("good") for key in batch.keys) for batch in epoch)
    assert_same(batches, take(loader(recipe("retrieval", **damaged), tokenizer, 7), 4))
    [(key, reason)] = loading.rejected
    assert key == "train.json#14" and '"caption" is a number' in reason


def test_more_rejects_than_the_recipe_allows_stop_the_run(damaged, recipe, tokenizer):
    loading = loader(recipe("retrieval", **damaged, max_rejects=1), tokenizer, 7)
    with pytest.raises(TooManyRejectsError, match="2 samples cannot be used, the recipe allows 1"):
        take(loading, 2)


def test_grounding_without_a_crop_sees_whole_images(recipe, tokenizer, world):
    still = {"crop_scale": None, "horizontal_flip": False, "randaugment": False}
    from PIL import Image

    from albef_ds.data.augment import EvalTransform

    [batch] = take(loader(recipe("grounding", augment=still), tokenizer), 1)
    for key, image in zip(batch.keys, batch.images, strict=True):
        assert torch.equal(image, EvalTransform(16)(Image.open(world.root / key).convert("RGB")))


@pytest.mark.parametrize("task", [task for task in KINDS])
def test_a_recipe_without_files_or_with_shards_is_refused(task, recipe, tokenizer):
    with pytest.raises(ConfigError, match=f"data.train is empty: name the annotation files to train {task} on"):
        loader(recipe(task, train=[]), tokenizer)
    with pytest.raises(ConfigError, match=f"data.shards is set, but {task} reads annotation files"):
        loader(recipe(task, shards=["somewhere"]), tokenizer)
    with pytest.raises(AnnotationError, match="nowhere.json"):
        loader(recipe(task, train=["nowhere.json"]), tokenizer)
    with pytest.raises(ConfigError, match="do not fill one global batch of 1000000"):
        loader(recipe(task), tokenizer, 1_000_000)


def test_each_data_sets_images_are_found_under_its_own_root(recipe, tokenizer, world, shapes_tasks, tmp_path):
    shutil.copytree(world.root, tmp_path / "genome")
    entries = json.loads(shapes_tasks.vqa_train.read_text())
    assert {entry["dataset"] for entry in entries} == {"vqa", "vg"}
    roots = {"vqa": str(world.root), "vg": str(tmp_path / "genome")}
    batches = take(loader(recipe("vqa", image_root="/nowhere", image_roots=roots), tokenizer), 4)
    assert not any(batch.rejected for batch in batches)
    shutil.rmtree(tmp_path / "genome")
    batches = take(loader(recipe("vqa", image_root="/nowhere", image_roots=roots), tokenizer), 10)
    lost = {key for batch in batches for key, _ in batch.rejected}
    assert lost and lost <= {entry["image"] for entry in entries if entry["dataset"] == "vg"}
