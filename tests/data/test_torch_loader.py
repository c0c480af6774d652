import json
import pickle
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image

from albef_ds.data.annotations import read_pairs
from albef_ds.data.augment import EvalTransform, TrainTransform
from albef_ds.data.torch_loader import PretrainingLoader, UnreadableImagesError


def loader(annotations, tokenizer, micro_batch=8, transform=None, **options):
    return PretrainingLoader(
        annotations, tokenizer, transform or TrainTransform(16), micro_batch=micro_batch, **options
    )


def take(batches, count):
    return list(islice(batches, count))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        for part in ("text", "masked"):
            for name, value in vars(getattr(a, part)).items():
                other = getattr(getattr(b, part), name)
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert (a.keys, a.rejected) == (b.keys, b.rejected)


def test_a_batch_is_what_the_type_says(annotations, tokenizer):
    [batch] = take(loader(annotations, tokenizer, mlm_probability=0.5).batches(0), 1)
    assert batch.images.shape == (8, 3, 16, 16) and batch.images.dtype == torch.float32
    assert batch.text.num_texts == len(batch) == len(batch.keys) == 8 and batch.rejected == ()
    assert batch.text.max_length <= 25
    assert (batch.text.input_ids[batch.text.cu_seqlens[:-1].long()] == tokenizer.cls_id).all()
    assert torch.equal(batch.masked.labels, batch.text.input_ids[batch.masked.positions])
    captions = {a.key: a.captions for a in annotations}
    for i, key in enumerate(batch.keys):
        tokens = batch.text.input_ids[batch.text.cu_seqlens[i] : batch.text.cu_seqlens[i + 1]]
        if len(tokens) < 25:
            assert tokenizer.decode(tokens.tolist()) in captions[key]


def test_workers_change_nothing(annotations, tokenizer):
    alone = take(loader(annotations, tokenizer).batches(0), 10)  # an epoch has 7
    assert_same(alone, take(loader(annotations, tokenizer, workers=2).batches(0), 10))


@pytest.mark.parametrize("workers, start", [(0, 1), (0, 5), (2, 5), (0, 8)])
def test_resuming_gives_the_rest_to_the_bit(annotations, tokenizer, workers, start):
    options = {"micro_batch": 5, "accumulation": 2, "seed": 4}  # 6 steps an epoch
    whole = take(loader(annotations, tokenizer, **options).batches(0), 20)
    assert_same(
        whole[2 * start :],
        take(loader(annotations, tokenizer, workers=workers, **options).batches(start), 20 - 2 * start),
    )


def test_ranks_share_a_step_as_one_rank_has_it(annotations, tokenizer):
    alone = take(loader(annotations, tokenizer, 8).batches(0), 9)
    ranks = [take(loader(annotations, tokenizer, 4, rank=r, world_size=2).batches(0), 9) for r in range(2)]
    accumulated = take(loader(annotations, tokenizer, 4, accumulation=2).batches(0), 18)
    for step, batch in enumerate(alone):
        for parts in ([r[step] for r in ranks], accumulated[2 * step : 2 * step + 2]):
            assert parts[0].keys + parts[1].keys == batch.keys
            assert torch.equal(torch.cat([p.images for p in parts]), batch.images)
            assert torch.equal(torch.cat([p.masked.input_ids for p in parts]), batch.masked.input_ids)
            assert torch.equal(torch.cat([p.masked.labels for p in parts]), batch.masked.labels)


def test_epochs_are_shuffled_and_augmented_anew(annotations, tokenizer):
    loading = loader(annotations, tokenizer, 6)
    assert loading.steps_per_epoch == 10 and loading.epoch_of(10) == 1
    batches = take(loading.batches(0), 20)
    epochs = [[key for batch in part for key in batch.keys] for part in (batches[:10], batches[10:])]
    assert epochs[0] != epochs[1] and set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == 60
    images = [
        {k: i for b in part for k, i in zip(b.keys, b.images, strict=True)} for part in (batches[:10], batches[10:])
    ]
    assert sum(torch.equal(images[0][key], images[1][key]) for key in images[0]) < 3


def test_every_caption_has_its_turn(annotations, tokenizer):
    loading = loader(annotations, tokenizer, 60, transform=EvalTransform(8), mlm_probability=0)
    seen = Counter()
    for batch in take(loading.batches(0), 12):
        assert batch.masked.positions.numel() == 0
        ids, ends = batch.text.input_ids.tolist(), batch.text.cu_seqlens.tolist()
        seen.update((key, tuple(ids[ends[i] : ends[i + 1]])) for i, key in enumerate(batch.keys))
    distinct = sum(len(set(map(tuple, tokenizer.encode(a.captions, 25)))) for a in annotations)
    assert distinct - 3 <= len(seen) <= distinct


def test_starting_leaves_torchs_generator_alone(annotations, tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(loader(annotations, tokenizer, workers=1).batches(0), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_goes_to_a_spawned_worker_pickles(annotations, tokenizer):
    samples = loader(annotations, tokenizer)._samples
    again = pickle.loads(pickle.dumps(samples))
    assert torch.equal(samples[3, 7][0].image, again[3, 7][0].image)


def test_too_few_samples_and_wrong_numbers(annotations, tokenizer):
    with pytest.raises(ValueError, match="60 samples do not fill one global batch of 64"):
        loader(annotations, tokenizer, 32, world_size=2)
    with pytest.raises(ValueError, match="mlm_probability is 1.5"):
        loader(annotations, tokenizer, mlm_probability=1.5)
    with pytest.raises(ValueError, match="start_step is -1"):
        loader(annotations, tokenizer).batches(-1)


@pytest.fixture
def damaged(tmp_path):
    """Twenty sound images and a few of every kind that is not."""
    image = Image.new("RGB", (40, 40), "green")
    captions = ["word " * 10_000, "nul\x00 and 🐕", "...!", "half \ud83d", "a dog"]
    entries = []
    for i in range(20):
        image.save(tmp_path / f"good{i}.jpg")
        entries.append({"image": f"good{i}.jpg", "caption": captions[i % len(captions)]})
    whole = (tmp_path / "good0.jpg").read_bytes()
    for name, data in {"truncated": whole[:-200], "empty": b"", "html": b"<html></html>", "missing": None}.items():
        if data is not None:
            (tmp_path / f"{name}.jpg").write_bytes(data)
        entries.append({"image": f"{name}.jpg", "caption": "bad"})
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    return read_pairs(tmp_path / "pairs.json")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_named(damaged, tokenizer, workers):
    batches = take(loader(damaged, tokenizer, 12, workers=workers).batches(0), 4)
    assert_same(batches, take(loader(damaged, tokenizer, 12).batches(0), 4))
    for epoch in (batches[:2], batches[2:]):
        rejected = dict(r for batch in epoch for r in batch.rejected)
        assert set(rejected) == {"truncated.jpg", "empty.jpg", "html.jpg", "missing.jpg"}
        assert rejected["missing.jpg"] == "the file does not exist" and "runcated" in rejected["truncated.jpg"]
        assert all(len(batch) == 12 and set(batch.keys) <= {f"good{i}.jpg" for i in range(20)} for batch in epoch)


def test_odd_captions_are_texts_too(damaged, tokenizer):
    lengths = {}
    for batch in take(loader(damaged, tokenizer, 8).batches(0), 3):
        lengths.update(zip(batch.keys, batch.text.cu_seqlens.diff().tolist(), strict=True))
    assert lengths["good0.jpg"] == 25 and lengths["good2.jpg"] == 1  # 10,000 words; punctuation alone: [CLS]


@pytest.mark.parametrize("workers", [0, 1])
def test_when_no_image_can_be_read_it_says_so(tmp_path, tokenizer, workers):
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": f"{i}.jpg", "caption": "a"} for i in range(9)]))
    batches = loader(read_pairs(tmp_path / "pairs.json"), tokenizer, workers=workers).batches(0)
    with pytest.raises(
        UnreadableImagesError, match=r"^images cannot be read: 21 drawn .*jpg: the file does not exist.*are right$"
    ):
        next(batches)
