"""Pre-training batches through NVIDIA DALI: the batches of `torch_loader`, sooner and for less of the CPU.

What is where. Bytes are read by this module's threads, each sample by its place in the shard's index, and handed to
DALI. Its own webdataset reader would know neither the order of `ShardOrder`, nor how to leave out one sample, nor how
to begin in mid-epoch with another number of ranks. The price, measured by `python -m benchmarks.loader` with decoding
alone: 0.08 ms of CPU an image more, of 2.1 in all, checksums included, and 0.88 of its images a second (0.79 to 0.96).
On a GPU, DALI decodes (hardware decoder), crops, resizes and mirrors, and PyTorch does RandAugment by the batch
(`augment_batch`) and normalises. On the CPU, DALI decodes and crops, to the bit as Pillow; threads resize with PyTorch,
which takes a quarter of Pillow's time for it and less of DALI's, and RandAugment is Pillow's itself (`augment`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from albef_ds.data.annotations import Annotation
from albef_ds.data.augment import MEAN, STD, Drawn, TrainTransform, apply_ops
from albef_ds.data.augment_batch import rand_augment_batch
from albef_ds.data.batch import PretrainingBatch
from albef_ds.data.dali_pipeline import MISSING, DaliDecoder, DecodingFailed, dali_available
from albef_ds.data.images import ImageError, decode_image
from albef_ds.data.masking import MaskedText, pack_masked
from albef_ds.data.order import SampleOrder
from albef_ds.data.raw_samples import RawSample, RawSamples, draw
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.threads import ahead, in_parts

log = logging.getLogger(__name__)

Rows = list[tuple[int, int]]  # (epoch, index) of each sample of a micro-batch


@dataclass(frozen=True)
class _Prepared:
    """A micro-batch on its way through DALI."""

    rows: Rows
    samples: list[RawSample]
    texts: list[MaskedText]
    drawn: list[Drawn]


class DaliLoader:
    """This rank's micro-batches, endlessly, from any optimiser step on; the same ones as `PretrainingLoader`'s but for
    the resize: on the CPU one pixel in a thousand is off by more than one grey value, by a few at sharp edges.

    annotations: a sequence of `Annotation`: a `ShardSet`, or files from `read_pairs`.
    transform: what to draw for an image, and its size.
    workers: threads that read and finish images, and as many of DALI's that decode. prefetch: batches ready ahead.
    device: where the images are decoded and the batches lie. dtype: of the images.

    DALI dies of an image it cannot decode. It is then started again, the image is put on a list, replaced by the one
    that `PretrainingLoader` would take, and named in `batch.rejected`; position and order stay as they are.

    Raises RuntimeError without DALI, ShardError and UnreadableImagesError while iterating.
    """

    def __init__(
        self,
        annotations: Sequence[Annotation],
        text: TextPipeline,
        transform: TrainTransform,
        order: SampleOrder,
        *,
        workers: int = 2,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        hw_decoder_load: float = 0.65,
    ):
        if not dali_available():
            raise RuntimeError(MISSING)
        self.order = order
        self.samples = RawSamples(annotations, order.seed)
        self._text, self._transform = text, transform
        self._workers, self._prefetch, self._dtype = max(1, workers), max(1, prefetch), dtype
        self._hw_decoder_load = hw_decoder_load
        self._device = torch.device(device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        return self.order.epoch_of(step)

    def batches(self, start_step: int = 0) -> Iterator[PretrainingBatch]:
        """Endless micro-batches, beginning with the first of `start_step`; a thread prepares them ahead."""
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: expected 0 or more")
        return ahead(lambda: self._work(start_step), self._prefetch)

    # -- what the thread does ------------------------------------------------------------------------------------------

    def _work(self, start_step: int) -> Iterator[PretrainingBatch]:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with ThreadPoolExecutor(self._workers) as pool, torch.cuda.stream(stream):
            decoder, on_the_way = self._decoder(), deque()
            for rows in self.order.micro_batches(start_step):
                on_the_way.append(self._prepare(rows, pool))
                try:
                    _feed(decoder, on_the_way[-1])
                    if len(on_the_way) <= self._prefetch:
                        continue
                    decoded = decoder.result()
                except DecodingFailed as error:
                    decoder = decoded = None
                    while decoded is None:
                        decoder, decoded = self._start_again(on_the_way, pool, error)
                batch = self._finish(on_the_way.popleft(), decoded, pool)
                if stream is not None:
                    stream.synchronize()  # here, where nobody waits for it
                yield batch

    def _decoder(self, batch: int | None = None) -> DaliDecoder:
        size, depth = self._transform.size, self._prefetch + 1 if batch is None else 1
        batch = batch or self.order.micro_batch
        return DaliDecoder(batch, size, self._device, self._workers, depth, self._hw_decoder_load)

    def _prepare(self, rows: Rows, pool: ThreadPoolExecutor) -> _Prepared:
        samples = in_parts(pool, self._workers, lambda row: self.samples.read(*row), rows)
        texts = self._text.batch([s.captions for s in samples], [s.rng for s in samples])
        return _Prepared(rows, samples, texts, [draw(self._transform, sample) for sample in samples])

    def _finish(
        self, prepared: _Prepared, decoded: Tensor | list[Tensor], pool: ThreadPoolExecutor
    ) -> PretrainingBatch:
        if self._device.type == "cuda":
            images = rand_augment_batch(decoded.permute(0, 3, 1, 2), [drawn.ops for drawn in prepared.drawn])
            images = _normalise(images, torch.empty(images.shape, device=self._device))
        else:
            size = self._transform.size
            images = torch.empty(len(decoded), 3, size, size)
            in_parts(
                pool,
                self._workers,
                lambda job: _finish_image(*job),
                [*zip(decoded, prepared.drawn, images, strict=True)],
            )
        text, masked = pack_masked(prepared.texts)
        batch = PretrainingBatch(
            images=images.to(self._dtype),
            text=text,
            masked=masked,
            keys=tuple(sample.key for sample in prepared.samples),
            rejected=tuple(r for sample in prepared.samples for r in sample.rejected),
        )
        return batch if self._device.type == "cpu" else batch.to(self._device)

    # -- survival ------------------------------------------------------------------------------------------------------

    def _start_again(self, on_the_way: deque[_Prepared], pool: ThreadPoolExecutor, error: DecodingFailed):
        """Finds what DALI died of, lists it, and feeds everything on its way to a new decoder, replacements included.

        Returns (decoder, the oldest batch's images), or (None, None) where it dies again: of the next bad image.
        """
        found = self._find_bad(on_the_way, pool)
        if not found:
            raise RuntimeError(f"DALI failed, and every image on its way is sound: {error}") from error
        log.warning("DALI was started again: %s", "; ".join(found))
        for i, prepared in enumerate(on_the_way):
            if any(s.index in self.samples.bad or s.index in self.samples.unusual for s in prepared.samples):
                on_the_way[i] = self._prepare(prepared.rows, pool)
        decoder = self._decoder()
        try:
            for prepared in on_the_way:
                _feed(decoder, prepared)
            return decoder, decoder.result()
        except DecodingFailed:
            return None, None

    def _find_bad(self, on_the_way: deque[_Prepared], pool: ThreadPoolExecutor) -> list[str]:
        """Pillow's judgement counts, as in `PretrainingLoader`; what it can decode and DALI cannot goes through it."""
        samples = [sample for prepared in on_the_way for sample in prepared.samples]
        bad = {
            s.index: fault
            for s, fault in zip(samples, in_parts(pool, self._workers, _fault, samples), strict=True)
            if fault
        }
        self.samples.bad.update(bad)
        if bad:
            return [f"{key}: {reason}" for key, reason in bad.values()]
        single, found = None, []
        for prepared in on_the_way:
            for sample, drawn in zip(prepared.samples, prepared.drawn, strict=True):
                single = single or self._decoder(batch=1)
                try:
                    single.feed([sample.data], [drawn.crop], [drawn.mirror])
                    single.result()
                except DecodingFailed:
                    single = None
                    if sample.index not in self.samples.unusual:
                        self.samples.unusual.add(sample.index)
                        found.append(f"{sample.key}: decoded by Pillow from now on, DALI cannot")
        return found


def _feed(decoder: DaliDecoder, prepared: _Prepared) -> None:
    drawn = prepared.drawn
    decoder.feed([s.data for s in prepared.samples], [d.crop for d in drawn], [d.mirror for d in drawn])


def _fault(sample: RawSample) -> tuple[str, str] | None:
    try:
        decode_image(sample.data.tobytes(), key=sample.key)
    except ImageError as error:
        return error.key, error.reason
    return None


# -- one image, on the CPU ---------------------------------------------------------------------------------------------

_SCALE = (1 / (255 * torch.tensor(STD))).view(3, 1, 1)
_SHIFT = (255 * torch.tensor(MEAN)).view(3, 1, 1)


def _finish_image(crop: Tensor, drawn: Drawn, out: Tensor) -> None:
    """[H, W, 3] uint8 -> out: [3, S, S] float32: resized, mirrored, RandAugment, normalised."""
    size = list(out.shape[1:])
    image = F.interpolate(crop.permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=True)[0]  # [3, S, S]
    if drawn.mirror:
        image = image.flip(2)
    if drawn.ops:
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        image = torch.from_numpy(np.array(apply_ops(picture, drawn.ops))).permute(2, 0, 1)
    _normalise(image, out)


def _normalise(images: Tensor, out: Tensor) -> Tensor:
    """[..., 3, H, W] uint8 -> out, with CLIP's mean and standard deviation taken out."""
    torch.sub(images, _SHIFT.to(out.device), out=out)
    return out.mul_(_SCALE.to(out.device))
