import numpy as np
import pytest
import torch
from PIL import Image

from albef_ds.data.augment import OPS, apply_ops
from albef_ds.data.augment_batch import rand_augment_batch
from tests.data.test_augment import photo

NAMES = tuple(OPS)


def flat(size):
    """Few colours and large areas of each: what equalisation by another formula gives away."""
    image = Image.new("RGB", (size, size), (40, 90, 200))
    image.paste((250, 10, 120), (3, 3, size // 2, size // 2))
    return image


PICTURES = {"photo": photo(48, 48), "flat": flat(48), "grey": Image.new("RGB", (48, 48), (128, 7, 255))}


def tensor(images):
    return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("picture", PICTURES)
def test_each_operation_is_pillows_within_one_grey_value(picture, name, sign):
    image = PICTURES[picture]
    [got] = rand_augment_batch(tensor([image]), [[(NAMES.index(name), sign)]])
    expected = tensor([apply_ops(image, ((NAMES.index(name), sign),))])[0]
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= 1
    exact = name in ("Identity", "AutoContrast", "Equalize", "Brightness", "TranslateX", "TranslateY")
    assert not exact or difference.max() == 0
    assert (difference > 0).float().mean() < 0.02


def test_every_image_gets_its_own_operations_in_its_order():
    rng = np.random.default_rng(1)
    ops = [[(int(rng.integers(10)), int(rng.choice([-1, 1]))) for _ in range(rng.integers(3))] for _ in range(40)]
    images = [photo(32, 32, seed) for seed in range(40)]
    before = tensor(images)
    got = rand_augment_batch(before, ops)
    expected = tensor([apply_ops(image, tuple(of)) for image, of in zip(images, ops, strict=True)])
    # A difference of one may grow when the second operation stretches what the first one left.
    assert ((got.int() - expected.int()).abs() > 3).float().mean() < 1e-3
    assert torch.equal(before, tensor(images))


def test_a_batch_without_operations():
    images = tensor([photo(16, 16)])
    assert torch.equal(rand_augment_batch(images, [()]), images)
