"""What `benchmarks.loader` compares with, on data that it makes: nothing here is used for training."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from albef_ds.data.augment import ENHANCE, FILL, MEAN, OPS, STD, TrainTransform, apply_ops, draw_ops, normalise
from albef_ds.data.masking import pack_masked
from albef_ds.data.packing import PackSettings, pack
from albef_ds.data.shard_folder import LocalFolder
from albef_ds.data.shard_order import ShardOrder
from albef_ds.data.shards import ShardSet
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.tokenizer import CaptionTokenizer, load_tokenizer, train_wordpiece

_CAPTION = "a photograph of number {} on a table beside a window in the evening"
_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


@dataclass(frozen=True)
class Data:
    folder: Path
    shards: ShardSet
    tokenizer: CaptionTokenizer
    photographs: str
    bytes_per_image: int


def make_data(folder: Path, images: int) -> Data:
    """Photographs of about 640 x 480 pixels, cut out at random, as JPEG of quality 90, packed."""
    source, name = _photographs()
    rng = np.random.default_rng(0)
    entries = []
    for i in range(images):
        picture = source[i % len(source)]
        share = rng.uniform(0.6, 1.0)
        width, height = round(picture.width * share), round(picture.height * share)
        left, top = int(rng.integers(picture.width - width + 1)), int(rng.integers(picture.height - height + 1))
        part = picture.crop((left, top, left + width, top + height)).resize((640, 480) if i % 3 else (480, 640))
        part.save(folder / f"{i}.jpg", quality=90)
        entries.append({"image": f"{i}.jpg", "caption": _CAPTION.format(i)})
    (folder / "list.json").write_text(json.dumps(entries))
    manifest = pack([folder / "list.json"], folder / "shards", PackSettings(samples_per_shard=200))
    train_wordpiece([e["caption"] for e in entries], 400, folder / "vocab.txt")
    shards = ShardSet([LocalFolder(str(folder / "shards"))])
    return Data(folder, shards, load_tokenizer(folder / "vocab.txt"), name, manifest.bytes // manifest.samples)


def _photographs() -> tuple[list[Image.Image], str]:
    """Those that come with scikit-image, read from its folder: its own functions may want to download them."""
    spec = importlib.util.find_spec("skimage")
    folders = [Path(folder) / "data" for folder in (spec.submodule_search_locations if spec else None) or ()]
    files = [folder / name for folder in folders for name in _PHOTOGRAPHS if (folder / name).is_file()]
    if files:
        names = ", ".join(file.stem for file in files)
        return [Image.open(file).convert("RGB") for file in files], f"scikit-image: {names}"
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return [Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)], "none (smooth noise)"


def cpu_seconds() -> float:
    """User and system time of this process and of its living children, which rusage leaves out."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            if int(fields[1]) == os.getpid():
                total += (int(fields[11]) + int(fields[12])) / ticks
    return total


# -- webdataset and torchvision ----------------------------------------------------------------------------------------


def webdataset_available() -> bool:
    return importlib.util.find_spec("webdataset") is not None


class _V2Sample:
    """A sample of webdataset to (image, masked text), the way of torchvision v2: on uint8 tensors."""

    def __init__(self, transform: TrainTransform, text: TextPipeline):
        self._randaugment, self._text = transform.randaugment, text
        crop = v2.RandomResizedCrop(
            transform.size, scale=transform.scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        self._before = v2.Compose([crop, v2.RandomHorizontalFlip()])
        self._after = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __call__(self, sample: dict):
        rng = np.random.default_rng()
        data = torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8)
        image = self._before(decode_jpeg(data, ImageReadMode.RGB))
        for op, sign in draw_ops(rng) if self._randaugment else ():
            image = _V2_OPS[tuple(OPS)[op]](image, sign)
        return self._after(image), self._text(json.loads(sample["json"])["captions"], rng)


def _affine(image, sign, angle=0.0, shift=(0, 0), shear=(0.0, 0.0)):
    bilinear = v2.InterpolationMode.BILINEAR
    return tv.affine(
        image, sign * angle, [sign * s for s in shift], 1.0, [sign * s for s in shear], bilinear, [FILL] * 3
    )


_SHEAR = float(np.degrees(np.arctan(0.21)))
_V2_OPS: dict[str, Callable] = {
    "Identity": lambda image, sign: image,
    "AutoContrast": lambda image, sign: tv.autocontrast(image),
    "Equalize": lambda image, sign: tv.equalize(image),
    "Brightness": lambda image, sign: tv.adjust_brightness(image, ENHANCE),
    "Sharpness": lambda image, sign: tv.adjust_sharpness(image, ENHANCE),
    "ShearX": lambda image, sign: _affine(image, sign, shear=(_SHEAR, 0.0)),
    "ShearY": lambda image, sign: _affine(image, sign, shear=(0.0, _SHEAR)),
    "TranslateX": lambda image, sign: _affine(image, sign, shift=(7, 0)),
    "TranslateY": lambda image, sign: _affine(image, sign, shift=(0, 7)),
    "Rotate": lambda image, sign: _affine(image, sign, angle=21.0),
}


def _collate(samples):
    return torch.stack([image for image, _ in samples]), pack_masked([text for _, text in samples])


def webdataset_loader(data: Data, transform: TrainTransform, batch: int, workers: int) -> Iterator:
    import webdataset

    urls = sorted(str(p) for p in (data.folder / "shards").glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=False, resampled=True).shuffle(200)
    samples = samples.map(_V2Sample(transform, TextPipeline(data.tokenizer))).batched(batch, collation_fn=_collate)
    return iter(
        webdataset.WebLoader(samples, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)
    )


# -- DALI's decoder and readers ----------------------------------------------------------------------------------------


def decoded(data: Data, batch: int, size: int, workers: int, device: torch.device, hw_decoder_load: float) -> Iterator:
    """Bytes in memory to crops on the CPU, to squares on a GPU: three batches on their way, as in training."""
    from albef_ds.data.dali_pipeline import DaliDecoder

    depth, rng, draw = 3, np.random.default_rng(0), TrainTransform(size).draw
    images = [data.shards[i].image for i in range(min(len(data.shards), 4 * batch))]
    crops = [draw(*Image.open(io.BytesIO(image)).size, rng).crop for image in images]
    given = itertools.cycle(zip((np.frombuffer(image, np.uint8) for image in images), crops, strict=True))
    decoder = DaliDecoder(batch, size, device, workers, depth, hw_decoder_load)
    for number in itertools.count():
        files, boxes = zip(*itertools.islice(given, batch), strict=True)
        decoder.feed(files, boxes, [False] * batch)
        if number >= depth - 1:
            yield decoder.result()


def handed_in(data: Data, batch: int, workers: int) -> Iterator:
    """Reading and decoding as `albef_ds.data.dali` does it, nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    from albef_ds.data.dali_pipeline import DaliDecoder
    from albef_ds.data.raw_samples import RawSamples, draw

    order, transform = ShardOrder.over(data.shards.corpora, micro_batch=batch), TrainTransform(256, randaugment=False)
    samples, depth = RawSamples(data.shards, 0), 3
    decoder = DaliDecoder(batch, 256, torch.device("cpu"), workers, depth)
    with ThreadPoolExecutor(workers) as pool:
        for number, rows in enumerate(order.micro_batches(0)):
            read = list(pool.map(lambda row: samples.read(*row), rows))
            drawn = [draw(transform, sample) for sample in read]
            decoder.feed([s.data for s in read], [d.crop for d in drawn], [d.mirror for d in drawn])
            if number >= depth - 1:
                yield decoder.result()


def dali_reader(data: Data, batch: int, workers: int) -> Iterator:
    """DALI's own: webdataset reader, decoding with a random crop."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    tars = sorted((data.folder / "shards").glob("*.tar"))

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None, prefetch_queue_depth=3)
    def pipeline():
        images, texts = fn.readers.webdataset(
            paths=[str(p) for p in tars],
            index_paths=[str(p.with_suffix(".idx")) for p in tars],
            ext=["jpg", "json"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=200,
        )
        crop = {"random_area": [0.2, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        return fn.decoders.image_random_crop(images, output_type=types.RGB, **crop), texts

    running = pipeline()
    running.build()
    while True:
        images, texts = running.run()
        yield [np.array(images.at(i)) for i in range(batch)], [bytes(texts.at(i)) for i in range(batch)]


# -- stages ------------------------------------------------------------------------------------------------------------


def stage_calls(data: Data, size: int, count: int = 32) -> tuple[dict[str, Callable[[], object]], int]:
    """({stage: does it for `count` images}, count)"""
    from torch.nn.functional import interpolate

    rng, text = np.random.default_rng(0), TextPipeline(data.tokenizer)
    count = min(count, len(data.shards))
    samples = [data.shards[i] for i in range(count)]
    draw = TrainTransform(size).draw
    pictures = [Image.open(io.BytesIO(s.image)).convert("RGB") for s in samples]
    boxes = [draw(*p.size, rng).crop for p in pictures]
    crops = [p.crop((x, y, x + w, y + h)) for p, (x, y, w, h) in zip(pictures, boxes, strict=True)]
    tensors = [torch.from_numpy(np.array(c)).permute(2, 0, 1)[None] for c in crops]
    resized = [c.resize((size, size), Image.Resampling.BICUBIC) for c in crops]
    ops = [draw_ops(rng) for _ in range(count)]

    def each(function, *lists):
        return lambda: [function(*items) for items in zip(*lists, strict=True)]

    def pillow_decode(sample, box):
        x, y, w, h = box
        return Image.open(io.BytesIO(sample.image)).convert("RGB").crop((x, y, x + w, y + h))

    calls = {
        "read from the shard": lambda: [data.shards[i] for i in range(count)],
        "caption to masked tokens": lambda: text.batch([s.captions for s in samples], [rng] * count),
        "decode and crop, Pillow": each(pillow_decode, samples, boxes),
        "resize, Pillow": each(lambda c: c.resize((size, size), Image.Resampling.BICUBIC), crops),
        "resize, PyTorch": each(lambda t: interpolate(t, size=[size, size], mode="bicubic", antialias=True), tensors),
        "RandAugment, Pillow": each(apply_ops, resized, ops),
        "normalise": each(normalise, resized),
    }
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        from albef_ds.data.dali_pipeline import DaliDecoder

        decoder = DaliDecoder(count, size, torch.device("cpu"), threads=1, depth=1)
        files = [np.frombuffer(s.image, np.uint8) for s in samples]

        def dali_decode():
            decoder.feed(files, boxes, [False] * count)
            return decoder.result()

        calls["decode and crop, DALI"] = dali_decode
    return calls, count
