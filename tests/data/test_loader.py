import logging
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from albef_ds.config import Config, ConfigError, plan_batches
from albef_ds.data import loader as module
from albef_ds.data.dali_pipeline import dali_available
from albef_ds.data.loader import TooManyRejectsError, build_loader
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.shard_format import ShardError
from albef_ds.data.torch_loader import TorchLoader
from tests.training_run import metrics, run_training, write_recipe

CPU = torch.device("cpu")
KINDS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not dali_available(), reason="NVIDIA DALI is not installed")),
]


@pytest.fixture(scope="module")
def packed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack([world.train], out, PackSettings(samples_per_shard=9))
    return out


def build(tokenizer, batch=6, ranks=1, rank=0, **data):
    config = Config.model_validate(
        {
            "model": {"vision": {"image_size": 24, "patch_size": 8}},
            "data": {"workers": 0, **data},
            "train": {"global_batch": batch},
        }
    )
    return build_loader(config, tokenizer, plan_batches(config, ranks), rank, ranks, CPU)


def take(loader, count, start=0):
    batches = loader.batches(start)
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


@pytest.mark.parametrize("kind", KINDS)
def test_from_shards_every_sample_comes_once_an_epoch_on_two_ranks(packed, tokenizer, kind):
    options = {"shards": (str(packed),), "loader": kind, "shuffle_buffer": 20}
    ranks = [take(build(tokenizer, 6, 2, r, **options), 20) for r in range(2)]
    epochs = [[k for rank in ranks for b in rank[part] for k in b.keys] for part in (slice(10), slice(10, 20))]
    assert all(len(set(keys)) == len(keys) == 60 for keys in epochs) and epochs[0] != epochs[1]
    again = take(build(tokenizer, 6, 2, 1, **options), 20)
    assert [b.keys for b in again] == [b.keys for b in ranks[1]]
    # Two ranks, then one, then two again: none twice, none lost.
    middle = take(build(tokenizer, 6, **options), 4, start=3)
    seen = [k for rank in ranks for b in (*rank[:3], *rank[7:10]) for k in b.keys] + [k for b in middle for k in b.keys]
    assert sorted(seen) == sorted(epochs[0])


def test_both_kinds_have_the_same_keys_and_texts(packed, world, tokenizer):
    if not dali_available():
        pytest.skip("NVIDIA DALI is not installed")
    for source in ({"shards": (str(packed),) * 2, "weights": (1, 0.5)}, {"train": (str(world.train),)}):
        ours, theirs = (take(build(tokenizer, loader=kind, **source), 12) for kind in ("dali", "torch"))
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys == b.keys and torch.equal(a.masked.input_ids, b.masked.input_ids)


def test_corpora_are_mixed_by_weight(packed, tokenizer):
    loader = build(tokenizer, batch=6, shards=(str(packed), str(packed)), weights=(1, 0.5), loader="torch")
    assert loader.steps_per_epoch == 15
    indices = [i for step in range(30) for i in loader.order.step_indices(step).ravel()]
    assert sorted(indices) == sorted([*range(60), *range(60), *range(60, 120)])


def test_without_dali_it_says_so_and_pillow_reads_the_same_shards(packed, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(module, "dali_available", lambda: False)
    caplog.set_level(logging.INFO)
    loader = build(tokenizer, shards=(str(packed),))
    assert isinstance(loader.loader, TorchLoader) and len(take(loader, 1)[0]) == 6
    assert "DALI is not installed: images are decoded by Pillow" in caplog.text
    with pytest.raises(ConfigError, match=r"data.loader is dali: .*pip install"):
        build(tokenizer, shards=(str(packed),), loader="dali")


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_rejects_stop(packed, tokenizer, tmp_path, kind):
    copy = shutil.copytree(packed, tmp_path / "copy")
    (copy / "shard-000002.tar").unlink()
    data = bytearray((copy / "shard-000001.tar").read_bytes())
    data[900] ^= 1
    (copy / "shard-000001.tar").write_bytes(data)
    options = {"shards": (str(copy),), "loader": kind, "on_bad_shard": "skip"}
    batches = take(build(tokenizer, max_rejects=2, **options), 10)
    rejected = {key for batch in batches for key, _ in batch.rejected}
    assert {Path(key).name for key in rejected} == {"shard-000002.tar", "shard-000001.tar, sample 0"}
    with pytest.raises(
        TooManyRejectsError, match=r"2 samples cannot be used, the recipe allows 1 \(data.max_rejects\)"
    ):
        take(build(tokenizer, max_rejects=1, **options), 10)
    with pytest.raises(ShardError, match="shard-000002.tar: missing"):
        build(tokenizer, **{**options, "on_bad_shard": "fatal"})


def test_what_contradicts_itself_is_refused(packed, world, tokenizer, tmp_path):
    shards = (str(packed),)
    for options, message in (
        ({}, "data.train and data.shards are empty"),
        ({"shards": shards, "train": (str(world.train),)}, "both set"),
        ({"shards": shards, "weights": (1, 2)}, "2 weights for 1 folders"),
        ({"train": (str(world.train),), "weights": (1,)}, "weights are for shards"),
        ({"shards": shards, "batch": 64}, "60 samples do not fill one global batch of 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(tokenizer, **options)


def test_a_cache_smaller_than_the_buffer_is_refused(packed, tokenizer, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(packed), "/small", recursive=True)
    options = {"shards": ("memory://small",), "cache_dir": str(tmp_path), "loader": "torch"}
    try:
        with pytest.raises(ConfigError, match="data.cache_gb is 1e-05: a shuffle buffer of 100000 samples"):
            build(tokenizer, cache_gb=1e-5, **options)
        assert len(take(build(tokenizer, cache_gb=0.01, **options), 1)[0]) == 6
    finally:
        memory.rm("/small", recursive=True)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_two_ranks_train_from_shards(tmp_path, kind):
    """tests/training/test_resume.py kills such runs; that a loader goes on to the bit, test_dali.py shows."""
    write_recipe(tmp_path)
    pack([tmp_path / "data" / "train.json"], tmp_path / "shards", PackSettings(samples_per_shard=25))
    shutil.rmtree(tmp_path / "data" / "images")  # nothing but the shards is read
    data = {"train": [], "shards": [str(tmp_path / "shards")], "loader": kind, "shuffle_buffer": 60}
    recipe = write_recipe(tmp_path, data=data)
    codes, output = run_training([str(recipe), "train.max_steps=6"])
    assert codes == [0, 0], output
    assert len(metrics(tmp_path / "run")) == 6
