import json
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from albef_ds.data.annotations import read_pairs
from albef_ds.data.augment import STD, TrainTransform, normalise
from albef_ds.data.dali_pipeline import DaliDecoder, DecodingFailed, dali_available
from albef_ds.data.images import decode_image
from albef_ds.data.order import SampleOrder
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.shard_folder import LocalFolder
from albef_ds.data.shard_order import ShardOrder
from albef_ds.data.shards import ShardSet
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.torch_loader import PretrainingLoader, UnreadableImagesError
from tests.data.damaged import CAPTIONS, encoded, photo, scrambled, unusable, unusual
from tests.data.test_torch_loader import assert_same

pytestmark = pytest.mark.skipif(
    not dali_available(), reason="NVIDIA DALI is not installed (pip install albef_ds[dali])"
)
CPU = torch.device("cpu")


def dali(samples, tokenizer, micro_batch=8, transform=None, order=None, **options):
    from albef_ds.data.dali import DaliLoader

    order = order or SampleOrder(len(samples), micro_batch)
    return DaliLoader(samples, TextPipeline(tokenizer), transform or TrainTransform(24), order, **options)


def pillow(samples, tokenizer, micro_batch=8, transform=None, order=None):
    return PretrainingLoader(samples, tokenizer, transform or TrainTransform(24), micro_batch=micro_batch, order=order)


def take(loader, count, start=0):
    batches = loader.batches(start)
    try:
        return list(islice(batches, count))
    finally:
        if hasattr(batches, "close"):
            batches.close()


def grey_values(first, second):
    """How far the images are apart [N, 3, R, R], in 255ths."""
    std = torch.tensor(STD).view(3, 1, 1)
    return torch.cat([(a.images - b.images).abs() * std * 255 for a, b in zip(first, second, strict=True)])


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack([world.train], out, PackSettings(samples_per_shard=9))
    return ShardSet([LocalFolder(str(out))])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(24):
        (folder / f"p{i}.jpg").write_bytes(encoded(photo(240, 180, i), quality=90))
    (folder / "list.json").write_text(json.dumps([{"image": f"p{i}.jpg", "caption": "a photo"} for i in range(24)]))
    return read_pairs(folder / "list.json")


def test_everything_but_the_resizes_rounding_is_the_torch_loaders(photos, tokenizer):
    transform = TrainTransform(64, randaugment=False)
    ours, theirs = (take(kind(photos, tokenizer, transform=transform), 6) for kind in (dali, pillow))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.keys, a.rejected) == (b.keys, b.rejected)
        assert torch.equal(a.masked.input_ids, b.masked.input_ids)
        assert torch.equal(a.masked.positions, b.masked.positions)
        assert a.images.dtype == torch.float32 and a.images.shape == b.images.shape and a.images.is_contiguous()
    apart = grey_values(ours, theirs)
    assert apart.mean() < 0.1 and (apart > 1.01).float().mean() < 1e-3 and apart.max() < 8


def test_with_randaugment_too(photos, tokenizer):
    ours, theirs = (take(kind(photos, tokenizer, transform=TrainTransform(64)), 6) for kind in (dali, pillow))
    apart = grey_values(ours, theirs)  # equalisation spreads what the resize left one apart
    assert apart.mean() < 0.5 and (apart > 3).float().mean() < 0.02


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"quality": 30}, {"optimize": True}])
def test_decoding_and_cropping_are_pillows_to_the_bit(options):
    data = encoded(photo(200, 152, 3), **options)
    crops = [(0, 0, 200, 152), (13, 7, 101, 88), (57, 31, 1, 1), (0, 151, 200, 1), (99, 3, 64, 149)]
    decoder = DaliDecoder(len(crops), 8, CPU, threads=1, depth=1)
    decoder.feed([np.frombuffer(data, np.uint8)] * len(crops), crops, [False] * len(crops))
    image = decode_image(data)
    for (left, top, width, height), got in zip(crops, decoder.result(), strict=True):
        expected = np.asarray(image.crop((left, top, left + width, top + height)))
        assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("workers, prefetch", [(1, 1), (3, 4)])
def test_threads_and_prefetch_change_nothing(shards, tokenizer, workers, prefetch):
    assert_same(take(dali(shards, tokenizer), 9), take(dali(shards, tokenizer, workers=workers, prefetch=prefetch), 9))


def test_resuming_in_mid_epoch_gives_the_rest_to_the_bit(shards, tokenizer):
    order = ShardOrder.over(shards.corpora, buffer=20, micro_batch=5, accumulation=2)  # 6 steps an epoch
    whole = take(dali(shards, tokenizer, order=order), 26)
    for start in (1, 4, 6, 7):
        assert_same(whole[2 * start :], take(dali(shards, tokenizer, order=order), 26 - 2 * start, start))


def test_ranks_share_a_step_as_one_rank_has_it(shards, tokenizer):
    def order(micro_batch, **numbers):
        return ShardOrder.over(shards.corpora, buffer=20, micro_batch=micro_batch, **numbers)

    alone = take(dali(shards, tokenizer, order=order(6)), 15)
    ranks = [take(dali(shards, tokenizer, order=order(3, rank=r, world_size=2)), 15) for r in range(2)]
    for step, batch in enumerate(alone):
        assert ranks[0][step].keys + ranks[1][step].keys == batch.keys
        assert torch.equal(torch.cat([r[step].images for r in ranks]), batch.images)
    assert len({key for batch in alone[:10] for key in batch.keys}) == 60


# -- survival ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Twelve sound images, all that is unusual, and all that is unusable: as files, that nobody has packed."""
    files = (
        {f"good{i}": encoded(photo(seed=i)) for i in range(12)} | unusual() | unusable() | {"scrambled": scrambled()}
    )
    captions = list(CAPTIONS.values())
    entries = [{"image": f"{n}.jpg", "caption": captions[i % len(captions)]} for i, n in enumerate(files)]
    for name, data in files.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    entries.append({"image": "missing.jpg", "caption": "x"})
    (tmp_path / "list.json").write_text(json.dumps(entries))
    return read_pairs(tmp_path / "list.json")


def test_all_damage_is_survived_as_by_the_torch_loader(mixed, tokenizer):
    transform = TrainTransform(24, randaugment=False)
    ours, theirs = (take(kind(mixed, tokenizer, 6, transform), 10) for kind in (dali, pillow))
    assert [b.keys for b in ours] == [b.keys for b in theirs]
    assert [b.rejected for b in ours] == [b.rejected for b in theirs]
    rejected = {key for batch in ours for key, _ in batch.rejected}
    assert rejected >= {f"{name}.jpg" for name in (*unusable(), "missing", "scrambled")}
    seen = {key for batch in ours for key in batch.keys}
    assert seen >= {f"{name}.jpg" for name in unusual()}
    assert grey_values(ours, theirs).mean() < 0.3


def test_dali_does_die_of_a_scrambled_image():
    """Else the tests below would show nothing."""
    decoder = DaliDecoder(1, 8, CPU, threads=1, depth=1)
    with pytest.raises(DecodingFailed):
        decoder.feed([np.frombuffer(scrambled(), np.uint8)], [(0, 0, 256, 256)], [False])
        decoder.result()


@pytest.mark.parametrize("judge", ["pillow", "dali alone"])
def test_after_dalis_death_it_goes_on_at_the_same_position(photos, tokenizer, monkeypatch, caplog, judge):
    """Images that look sound until DALI is at work: replaced where Pillow cannot decode them either."""
    from albef_ds.data import dali as module

    order = SampleOrder(24, 4)
    whole = take(dali(photos, tokenizer, order=order), 12)
    victims = {"p3.jpg", "p17.jpg"}
    bad = np.frombuffer(scrambled(), np.uint8)
    original = module._feed
    decode = module.decode_image

    def feed(decoder, prepared):
        data = [bad if s.key in victims and s.data[:2].tobytes() == b"\xff\xd8" else s.data for s in prepared.samples]
        decoder.feed(
            data, [(0, 0, 9, 9) if d is bad else p.crop for d, p in zip(data, prepared.drawn, strict=True)], []
        )

    def judged(data, key):
        if key in victims and judge == "pillow":
            raise module.ImageError(key, "cannot be decoded: as told")
        return decode(data, key=key)

    monkeypatch.setattr(module, "_feed", feed)
    monkeypatch.setattr(module, "decode_image", judged)
    if judge == "dali alone":
        # The single-image trial has to meet the same bytes as the batch did.
        tried = module.DaliDecoder.feed

        def trial(self, images, crops, mirror):
            keys = {a.tobytes(): k for k, a in files.items()}
            tried(self, [bad if keys.get(i.tobytes()) in victims else i for i in images], crops, mirror)

        files = {a.key: np.fromfile(a.image, np.uint8) for a in photos}
        monkeypatch.setattr(module.DaliDecoder, "feed", trial)
        monkeypatch.setattr(module, "_feed", original)
    got = take(dali(photos, tokenizer, order=order), 12)
    assert "DALI was started again" in caplog.text
    if judge == "dali alone":  # decoded by Pillow: nothing is lost, and to the bit the same
        assert_same(got, whole)
        return
    for a, b in zip(got, whole, strict=True):
        for i, key in enumerate(b.keys):
            if key in victims:
                assert a.keys[i] not in victims and (key, "cannot be decoded: as told") in a.rejected
            else:
                assert a.keys[i] == key and torch.equal(a.images[i], b.images[i])
    resumed = take(dali(photos, tokenizer, order=order), 4, start=8)  # meets the same images anew
    assert_same(got[8:], resumed)


def test_when_nothing_can_be_read_it_says_so(tmp_path, tokenizer):
    (tmp_path / "list.json").write_text(json.dumps([{"image": f"{i}.jpg", "caption": "a"} for i in range(9)]))
    with pytest.raises(UnreadableImagesError, match="the file does not exist"):
        take(dali(read_pairs(tmp_path / "list.json"), tokenizer), 1)


def test_the_thread_ends_with_the_iterator(shards, tokenizer):
    before = threading.active_count()
    batches = dali(shards, tokenizer).batches(0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="start_step is -1"):
        dali(shards, tokenizer).batches(-1)


def test_the_images_come_in_the_type_asked_for(shards, tokenizer):
    [single], [half] = (take(dali(shards, tokenizer, dtype=t), 1) for t in (torch.float32, torch.bfloat16))
    assert half.images.dtype == torch.bfloat16 and torch.equal(half.images, single.images.bfloat16())


def test_normalisation_is_the_transforms():
    from albef_ds.data.dali import _normalise

    image = photo(32, 32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.allclose(_normalise(pixels, torch.empty(3, 32, 32)), normalise(image), atol=2e-6)
