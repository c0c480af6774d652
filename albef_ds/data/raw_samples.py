"""From (epoch, index) to a file's bytes and everything random about the sample, for a decoder that works by the batch.

The same draws in the same order as `torch_loader`: a sample that cannot be used is replaced by the same other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from albef_ds.data.annotations import Annotation
from albef_ds.data.augment import Drawn, TrainTransform
from albef_ds.data.images import MAX_PIXELS, ImageError, decode_image
from albef_ds.data.jpeg import END_OF_IMAGE, read_jpeg_header
from albef_ds.data.order import sample_rng
from albef_ds.data.torch_loader import MAX_REPLACEMENTS, nothing_readable


@dataclass(frozen=True)
class RawSample:
    index: int  # of what is in its place in the end
    key: str
    captions: tuple[str, ...]
    data: np.ndarray  # [bytes] uint8: a plain JPEG, or a PPM
    width: int
    height: int
    rejected: tuple[tuple[str, str], ...]
    rng: np.random.Generator  # has drawn the replacements; the caption, the masks and the crop are still to come


@dataclass(frozen=True)
class RawSamples:
    """bad: samples that proved undecodable, with the reason; they are replaced from then on.
    unusual: samples that Pillow can decode and DALI cannot."""

    annotations: Sequence[Annotation]
    seed: int
    bad: dict[int, tuple[str, str]] = field(default_factory=dict)
    unusual: set[int] = field(default_factory=set)

    def read(self, epoch: int, index: int) -> RawSample:
        """The sample, or another in its place. Raises UnreadableImagesError where 20 of these cannot be used either."""
        rng = sample_rng(self.seed, epoch, index)
        rejected = []
        for _ in range(1 + MAX_REPLACEMENTS):
            try:
                if index in self.bad:
                    raise ImageError(*self.bad[index])
                annotation = self.annotations[index]
                data, width, height = decodable(annotation, through_pillow=index in self.unusual)
                return RawSample(index, annotation.key, annotation.captions, data, width, height, tuple(rejected), rng)
            except ImageError as error:
                rejected.append((error.key, error.reason))
            index = int(rng.integers(len(self.annotations)))
        raise nothing_readable(rejected)


def decodable(annotation: Annotation, through_pillow: bool = False) -> tuple[np.ndarray, int, int]:
    """(bytes, width, height) of something that every decoder renders alike: the file itself where it is a plain JPEG.

    Anything else (grey, CMYK, PNG, …) is decoded by Pillow and handed on as a PPM. Raises ImageError.
    """
    data = annotation.image if isinstance(annotation.image, bytes) else _read(annotation)
    header = None if through_pillow else read_jpeg_header(data)
    if header and header.plain and header.width * header.height <= MAX_PIXELS and data.endswith(END_OF_IMAGE):
        return np.frombuffer(data, dtype=np.uint8), header.width, header.height
    image = decode_image(data, key=annotation.key)
    head = f"P6 {image.width} {image.height} 255\n".encode()
    return np.frombuffer(head + image.tobytes(), dtype=np.uint8), image.width, image.height


def _read(annotation: Annotation) -> bytes:
    try:
        with open(annotation.image, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise ImageError(annotation.key, "the file does not exist") from None
    except (OSError, ValueError) as error:
        raise ImageError(annotation.key, f"cannot be decoded: {getattr(error, 'strerror', None) or error}") from error


def draw(transform: TrainTransform, sample: RawSample) -> Drawn:
    return transform.draw(sample.width, sample.height, sample.rng)
