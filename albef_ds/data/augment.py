"""The reference's image augmentations, drawn from a generator that the caller holds.

Sources: dataset/__init__.py and dataset/randaugment.py of the reference. Its RandAugment computes with OpenCV, this one
with Pillow: geometry is the same to the sub-pixel (OpenCV puts pixel centres at whole numbers, Pillow at halves; see
`_affine`), values differ by rounding, and at the edge of what a shear or rotation leaves empty.
One thing is not copied: the reference's AutoContrast negates an unsigned byte, so that a channel whose darkest value is
not 0 turns white all over. Here it stretches the contrast, as its comment there says it should.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP
STD = (0.26862954, 0.26130258, 0.27577711)

_MEAN, _STD = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
FILL = 128
_NUM_OPS = 2
_PROBABILITY = 0.5
_LEVEL = 7 / 10  # magnitude 7 on a scale of 10
ENHANCE = _LEVEL * 1.8 + 0.1  # one-sided: always brighter, always sharper
_SHEAR = _LEVEL * 0.3
_ROTATE = _LEVEL * 30  # degrees
_TRANSLATE = _LEVEL * 10  # pixels, whatever the image's size

BRIGHTER = [min(255, int(value * ENHANCE)) for value in range(256)]


@dataclass(frozen=True)
class Drawn:
    """All that chance decides about one image."""

    crop: tuple[int, int, int, int]  # left, top, width, height in pixels
    mirror: bool
    ops: tuple[tuple[int, int], ...]  # (number in OPS, sign) of the operations to apply, in this order


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, mirror, RandAugment, normalisation.

    horizontal_flip also mirrors what a caption calls left and right; so does the reference in pre-training.
    """

    size: int
    scale: tuple[float, float] | None = (0.2, 1.0)  # share of the image's area that a crop has; None: no crop
    horizontal_flip: bool = True
    randaugment: bool = True

    def draw(self, width: int, height: int, rng: np.random.Generator) -> Drawn:
        """What is to be done to an image of this size. Every loader draws with this, so that they agree."""
        crop = (0, 0, width, height) if self.scale is None else _random_crop(width, height, self.scale, rng)
        mirror = self.horizontal_flip and rng.random() < 0.5
        return Drawn(crop, mirror, draw_ops(rng) if self.randaugment else ())

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """PIL RGB image of any size -> [3, size, size] float32."""
        drawn = self.draw(image.width, image.height, rng)
        left, top, width, height = drawn.crop
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if drawn.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return normalise(apply_ops(image, drawn.ops))


@dataclass(frozen=True)
class EvalTransform:
    """Resizes to a square, whatever the image's shape, and normalises."""

    size: int

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """PIL RGB image of any size -> [3, size, size] float32. `rng` is not used."""
        return normalise(image.resize((self.size, self.size), Image.Resampling.BICUBIC))


def normalise(image: Image.Image) -> Tensor:
    """PIL RGB image -> [3, H, W] float32 with CLIP's mean and standard deviation taken out."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))  # [H, W, 3]
    return pixels.permute(2, 0, 1).contiguous().div_(255).sub_(_MEAN).div_(_STD)


def draw_ops(rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """(operation, sign): two of the ten operations, drawn with replacement, each kept with probability 0.5."""
    drawn = []
    for op in rng.integers(len(OPS), size=_NUM_OPS).tolist():
        if rng.random() < _PROBABILITY:
            drawn.append((op, 1 if rng.random() < 0.5 else -1))
    return tuple(drawn)


def rand_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Applies what `draw_ops` draws, at magnitude 7."""
    return apply_ops(image, draw_ops(rng))


def apply_ops(image: Image.Image, ops: tuple[tuple[int, int], ...]) -> Image.Image:
    for op, sign in ops:
        image = _OPS[op](image, sign)
    return image


def _random_crop(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) as torchvision's RandomResizedCrop draws them, with ratios from 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # An image too long for any of these: the largest crop of an allowed ratio, from the middle.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """The pixel at column x, row y is taken from column a x + b y + c, row d x + e y + f, in OpenCV's whole numbers.

    Pillow counts from pixel corners: both its coordinates are larger by a half.
    """
    data = (a, b, c + 0.5 - 0.5 * (a + b), d, e, f + 0.5 - 0.5 * (d + e))
    return image.transform(
        image.size, Image.Transform.AFFINE, data, resample=Image.Resampling.BILINEAR, fillcolor=(FILL, FILL, FILL)
    )


Matrix = tuple[float, float, float, float, float, float]


def _rotation(sign: int, width: int, height: int) -> Matrix:
    # Counter-clockwise for a positive angle, around (W / 2, H / 2) counted in whole pixels: the reference's centre is
    # half a pixel off the image's.
    x, y = width / 2, height / 2
    cos, sin = math.cos(math.radians(_ROTATE)), sign * math.sin(math.radians(_ROTATE))
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# (sign, width, height) -> (a, b, c, d, e, f) of `_affine`
MATRICES: dict[str, Callable[[int, int, int], Matrix]] = {
    "ShearX": lambda sign, width, height: (1, -sign * _SHEAR, 0, 0, 1, 0),
    "ShearY": lambda sign, width, height: (1, 0, 0, -sign * _SHEAR, 1, 0),
    "TranslateX": lambda sign, width, height: (1, 0, sign * _TRANSLATE, 0, 1, 0),
    "TranslateY": lambda sign, width, height: (1, 0, 0, 0, 1, sign * _TRANSLATE),
    "Rotate": _rotation,
}


def _warp(name: str) -> Callable[[Image.Image, int], Image.Image]:
    return lambda image, sign: _affine(image, *MATRICES[name](sign, *image.size))


OPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "Identity": lambda image, sign: image,
    "AutoContrast": lambda image, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, sign: ImageOps.equalize(image),
    "Brightness": lambda image, sign: image.point(BRIGHTER * 3),
    "Sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(ENHANCE),
    **{name: _warp(name) for name in MATRICES},
}
_OPS = tuple(OPS.values())
