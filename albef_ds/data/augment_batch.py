"""The ten operations of RandAugment for a whole batch, in PyTorch: what the DALI loader computes them with on a GPU.

Pillow's rendering (`augment`) is what they mean, and what the tests compare with, to one grey value. They are not
DALI's: its equalisation is OpenCV's, by another formula, and its warps blend the border with the fill.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from albef_ds.data.augment import BRIGHTER, ENHANCE, FILL, MATRICES, OPS

_NAMES = tuple(OPS)
Ops = Sequence[tuple[int, int]]  # (number in OPS, sign)


def rand_augment_batch(images: Tensor, ops: Sequence[Ops]) -> Tensor:
    """[B, 3, H, W] uint8 -> the same with each image's operations applied in its order. `images` is not changed."""
    images = images.clone()
    for turn in range(max((len(of_image) for of_image in ops), default=0)):
        chosen: dict[str, list[tuple[int, int]]] = {}
        for i, of_image in enumerate(ops):
            if turn < len(of_image):
                op, sign = of_image[turn]
                chosen.setdefault(_kind(_NAMES[op]), []).append((i, op if _NAMES[op] in MATRICES else 0, sign))
        for kind, members in chosen.items():
            if kind == "Identity":
                continue
            rows = torch.tensor([i for i, _, _ in members], device=images.device)
            part = images.index_select(0, rows)
            if kind == "warp":
                part = _warp(part, [(_NAMES[op], sign) for _, op, sign in members])
            else:
                part = _VALUES[kind](part)
            images.index_copy_(0, rows, part)
    return images


def _kind(name: str) -> str:
    return "warp" if name in MATRICES else name


def _warp(images: Tensor, ops: Sequence[tuple[str, int]]) -> Tensor:
    """Bilinear between pixel centres; what comes from outside of the image is grey, nothing is blended with it."""
    height, width = images.shape[2:]
    matrices = [MATRICES[name](sign, width, height) for name, sign in ops]
    a, b, c, d, e, f = torch.tensor(matrices, dtype=torch.float32, device=images.device).T[
        :, :, None, None
    ]  # [n, 1, 1]
    y, x = torch.meshgrid(
        *(torch.arange(n, device=images.device, dtype=torch.float32) for n in (height, width)), indexing="ij"
    )
    from_x, from_y = a * x + b * y + c + 0.5, d * x + e * y + f + 0.5  # [n, H, W], counted from the corner
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    grid = torch.stack([from_x / width * 2 - 1, from_y / height * 2 - 1], dim=-1)
    sampled = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    # Pillow cuts the fraction off; the thousandth is for what float32 leaves of a whole number.
    return torch.where(inside[:, None], (sampled + 1e-3).floor().clamp(0, 255), FILL).to(torch.uint8)


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """tables: [n, 3, 256] uint8, one a channel."""
    shape = images.shape
    return tables.gather(2, images.flatten(2).long()).view(shape)


def _autocontrast(images: Tensor) -> Tensor:
    pixels = images.flatten(2)
    low, high = pixels.amin(2, keepdim=True).double(), pixels.amax(2, keepdim=True).double()  # [n, 3, 1]
    scale = 255 / (high - low).clamp(min=1)
    value = torch.arange(256, device=images.device, dtype=torch.float64)
    # As Pillow rounds: value * scale - low * scale, the fraction cut off.
    stretched = (value * scale - low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, value).to(torch.uint8))


def _equalize(images: Tensor) -> Tensor:
    pixels = images.flatten(2).long()  # [n, 3, P]
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    last = counts.gather(2, pixels.amax(2, keepdim=True))  # how many pixels have the highest value
    step = (pixels.shape[2] - last) // 255  # [n, 3, 1]
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    unchanged = torch.arange(256, device=images.device)
    return _look_up(images, torch.where(step > 0, table, unchanged).to(torch.uint8))


def _brightness(images: Tensor) -> Tensor:
    table = torch.tensor(BRIGHTER, dtype=torch.uint8, device=images.device)
    return table[images.long()]


def _sharpness(images: Tensor) -> Tensor:
    smooth = images.float()
    if min(images.shape[2:]) > 2:  # Pillow's filter leaves the border as it is
        kernel = torch.ones(3, 1, 3, 3, device=images.device)  # whole numbers: exact in TF32 too
        kernel[:, :, 1, 1] = 5
        filtered = F.conv2d(smooth, kernel, groups=3) / 13
        smooth[:, :, 1:-1, 1:-1] = (filtered + 0.5 + 1e-3).floor().clamp(0, 255)
    sharp = smooth + (images.float() - smooth) * ENHANCE
    return (sharp + 1e-4).trunc().clamp(0, 255).to(torch.uint8)


_VALUES = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
}
