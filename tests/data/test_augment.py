import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import functional

from albef_ds.data import augment
from albef_ds.data.augment import MEAN, OPS, STD, EvalTransform, TrainTransform


def photo(width=60, height=44, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.5))


def torchvision_normalised(image):
    return functional.normalize(functional.to_tensor(image), MEAN, STD)


def warped(image, matrix):
    """The image moved by a forward matrix [2, 3] on whole-numbered pixel centres, and where it is certain [H, W].

    Bilinear in floating point, 128 outside: what the reference's warpAffine is documented to compute.
    """
    source = np.asarray(image).astype(float)
    height, width = source.shape[:2]
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    rows, columns = np.mgrid[:height, :width]
    x, y, _ = np.tensordot(inverse, np.stack([columns, rows, np.ones_like(rows)]), axes=1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    result = np.zeros_like(source)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = np.abs(1 - dx - (x - x0)) * np.abs(1 - dy - (y - y0))
        inside = (0 <= x0 + dx) & (x0 + dx < width) & (0 <= y0 + dy) & (y0 + dy < height)
        taken = source[(y0 + dy).clip(0, height - 1), (x0 + dx).clip(0, width - 1)]
        result += weight[..., None] * np.where(inside[..., None], taken, 128)
    # Within a pixel of the border OpenCV blends with the fill and Pillow does not.
    near = (np.abs(x + 0.5 - width / 2) - width / 2, np.abs(y + 0.5 - height / 2) - height / 2)
    certain = np.abs(np.maximum(*near)) > 1
    return result, certain


def rotation(degrees, cx, cy):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, s, (1 - c) * cx - s * cy], [-s, c, s * cx + (1 - c) * cy]])


GEOMETRY = {  # forward matrices for sign +1 and an image 60 x 44, magnitude 7 of 10
    "ShearX": lambda sign: np.array([[1, sign * 0.21, 0], [0, 1, 0]]),
    "ShearY": lambda sign: np.array([[1, 0, 0], [sign * 0.21, 1, 0]]),
    "TranslateX": lambda sign: np.array([[1, 0, -sign * 7.0], [0, 1, 0]]),
    "TranslateY": lambda sign: np.array([[1, 0, 0], [0, 1, -sign * 7.0]]),
    "Rotate": lambda sign: rotation(sign * 21, 30, 22),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_is_the_references_within_one_grey_value(name, sign):
    image = photo()
    expected, certain = warped(image, GEOMETRY[name](sign))
    got = np.asarray(OPS[name](image, sign)).astype(float)
    assert certain.mean() > 0.9
    assert np.abs(got - expected)[certain].max() <= 1.01


VALUES = {
    "Identity": lambda image: image,
    "AutoContrast": ImageOps.autocontrast,
    "Equalize": ImageOps.equalize,
    "Brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.36),
    "Sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.36),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_pillows_within_one_grey_value(name):
    image = photo()
    got, expected = (np.asarray(i).astype(int) for i in (OPS[name](image, 1), VALUES[name](image)))
    assert np.abs(got - expected).max() <= 1
    assert name == "Identity" or not np.array_equal(got, np.asarray(image))


def test_the_ten_operations_are_all_there():
    assert set(OPS) == set(GEOMETRY) | set(VALUES)


def test_autocontrast_does_not_whiten_an_image_without_black():
    image = Image.fromarray(np.asarray(photo()) // 2 + 60)
    got = np.asarray(OPS["AutoContrast"](image, 1))
    assert got.min() == 0 and got.max() == 255 and 60 < got.mean() < 200


def test_randaugment_draws_two_of_ten_each_with_one_half(monkeypatch):
    applied = []
    recorders = tuple(lambda image, sign, i=i: applied.append((i, sign)) or image for i in range(10))
    monkeypatch.setattr(augment, "_OPS", recorders)
    rng = np.random.default_rng(0)
    for _ in range(4000):
        augment.rand_augment(None, rng)
    assert len(applied) == pytest.approx(4000, rel=0.05)  # 2 x 0.5 an image
    counts = np.bincount([i for i, _ in applied], minlength=10)
    assert counts.min() > 320 and counts.max() < 480
    assert sum(sign for _, sign in applied) / len(applied) == pytest.approx(0, abs=0.05)


def test_eval_is_torchvisions_chain_to_the_bit():
    image = photo(70, 50)
    expected = torchvision_normalised(functional.resize(image, [32, 32], functional.InterpolationMode.BICUBIC))
    got = EvalTransform(32)(image)
    assert torch.equal(got, expected)
    assert got.dtype == torch.float32 and got.is_contiguous()


def test_train_crop_is_torchvisions_to_the_bit():
    image = photo(70, 50)
    transform = TrainTransform(32, horizontal_flip=False, randaugment=False)
    left, top, width, height = augment._random_crop(70, 50, (0.2, 1.0), np.random.default_rng(5))
    cropped = functional.resized_crop(image, top, left, height, width, [32, 32], functional.InterpolationMode.BICUBIC)
    assert torch.equal(transform(image, np.random.default_rng(5)), torchvision_normalised(cropped))


def test_half_of_the_images_are_mirrored():
    image = photo(32, 32)
    transform = TrainTransform(32, scale=(1.0, 1.0), randaugment=False)
    mirrored = torchvision_normalised(ImageOps.mirror(image))
    # A crop of the whole area has ratio 1 only by chance, so crops are fixed here; the rest is as in training.
    crops, augment._random_crop = augment._random_crop, lambda w, h, scale, rng: (0, 0, w, h)
    try:
        seen = [torch.equal(transform(image, np.random.default_rng(i)), mirrored) for i in range(300)]
    finally:
        augment._random_crop = crops
    assert 110 < sum(seen) < 190


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
def test_crops_lie_within_the_image(width, height, seed):
    left, top, w, h = augment._random_crop(width, height, (0.2, 1.0), np.random.default_rng(seed))
    assert 0 <= left <= left + w <= width and 0 <= top <= top + h <= height and w > 0 and h > 0


def test_crops_have_the_areas_and_ratios_asked_for():
    rng = np.random.default_rng(0)
    crops = np.array([augment._random_crop(400, 400, (0.2, 1.0), rng)[2:] for _ in range(3000)])
    shares, ratios = crops.prod(1) / 160_000, crops[:, 0] / crops[:, 1]
    assert shares.min() > 0.19 and 0.5 < shares.mean() < 0.62
    assert ratios.min() > 0.74 and ratios.max() < 1.35 and np.median(ratios) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 5)])
def test_tiny_and_long_images(size):
    image = Image.new("RGB", size, "red")
    for seed in range(20):
        got = TrainTransform(16)(image, np.random.default_rng(seed))
        assert got.shape == (3, 16, 16) and got.isfinite().all()


def test_the_generator_alone_decides():
    image, transform = photo(), TrainTransform(24)
    first = [transform(image, np.random.default_rng(i)) for i in range(10)]
    torch.manual_seed(9)
    again = [transform(image, np.random.default_rng(i)) for i in range(10)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert np.array_equal(np.asarray(image), np.asarray(photo()))  # the input is left as it was
