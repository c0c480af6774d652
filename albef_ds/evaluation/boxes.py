"""From a heat map to a box: is what the text refers to where the map is hot?

A box is [x, y, w, h] in pixels of the original image, x and y its upper left corner, as in COCO. A heat map [g, g']
covers the whole image, whatever its proportions, because training squeezes images into a square.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ENOUGH = 0.5  # a box is right from this IoU on

Box = Tensor | Sequence[float]


def iou(a: Tensor | Sequence, b: Tensor | Sequence) -> Tensor:
    """Intersection over union of boxes [..., 4] and [..., 4], which broadcast: [...] fp64, 0 to 1.

    A box without area, or with a NaN, has 0 with every other. All pairs: `iou(a[:, None], b)`.
    """
    a, b = _boxes(a), _boxes(b)
    first = torch.maximum(a[..., :2], b[..., :2])
    end = torch.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    return _share(a, b, (end - first).clamp(min=0))


def reference_iou(a: Tensor | Sequence, b: Tensor | Sequence) -> Tensor:
    """The same as the reference has it (dataset/utils.py, computeIoU): the last pixel counts, from x to x + w - 1.

    Areas come out the same; but boxes that share one column or one row of pixels, or less, have 0. Published numbers
    were made with it.
    """
    a, b = _boxes(a), _boxes(b)
    # In the reference's order of operations: fractions of pixels that sum to one overlap or do not by rounding alone.
    first = torch.maximum(a[..., :2], b[..., :2])
    last = torch.minimum(a[..., :2] + a[..., 2:] - 1, b[..., :2] + b[..., 2:] - 1)
    overlaps = (first < last).all(dim=-1, keepdim=True)
    return _share(a, b, torch.where(overlaps, last - first + 1, 0.0))


def upsampled(heatmap: Tensor, width: int, height: int) -> Tensor:
    """A heat map [g, g'] for every pixel: [height, width] fp32, bicubic as in the reference.

    Raises ValueError where the map is not two-dimensional, is empty, or holds NaN or infinity.
    """
    if heatmap.dim() != 2 or heatmap.numel() == 0:
        raise ValueError(f"heat map of shape {list(heatmap.shape)}: expected [rows, columns]")
    if width < 1 or height < 1:
        raise ValueError(f"image of {width} x {height} pixels: expected at least one pixel")
    if not torch.isfinite(heatmap).all():
        raise ValueError("the heat map holds NaN or infinity; a model that has diverged gives such, or half precision")
    grid = heatmap.detach().float()[None, None]
    return F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def rank_proposals(heatmap: Tensor, proposals: Tensor | Sequence, width: int, height: int, alpha: float = 0.5) -> int:
    """Which proposal holds most heat: the index of the largest of `heat_of_proposals`, the first of equal ones.

    Source: the reference's grounding_eval (dataset/utils.py). There the best score starts at 0, so that where none is
    positive, the box of the sample before is judged; here the largest wins whatever its sign.
    """
    heat = heat_of_proposals(heatmap, proposals, width, height, alpha)
    return int((heat == heat.max()).nonzero()[0])  # argmax does not promise the first of equal ones


def heat_of_proposals(
    heatmap: Tensor, proposals: Tensor | Sequence, width: int, height: int, alpha: float = 0.5
) -> Tensor:
    """[N] fp64: the sum of the map inside each proposal / area ** alpha; -inf for one that covers no pixel.

    Args:
        heatmap: [g, g'], any sign.
        proposals: [N, 4]. Only what lies in the image is summed; the area is the whole box's.
        width, height: of the image, pixels.
        alpha: 0 prefers large boxes, 1 compares means.

    Raises ValueError where there is no proposal, where one is not finite, or where none covers a pixel.
    """
    boxes = _boxes(proposals)
    if boxes.dim() != 2 or boxes.shape[0] == 0:
        raise ValueError(f"proposals of shape {list(boxes.shape)}: expected [N, 4] with at least one")
    if not torch.isfinite(boxes).all():
        first = int((~torch.isfinite(boxes)).any(dim=1).nonzero()[0])
        raise ValueError(f"proposal {first} is {boxes[first].tolist()}: expected four finite numbers")
    pixels = upsampled(heatmap, width, height)
    # total[r, c] is the sum of all above row r and left of column c, so that any number of boxes costs one pass.
    total = F.pad(pixels.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    boxes = boxes.to(pixels.device)
    x, y, w, h = boxes.unbind(dim=1)
    left, right = (edge.trunc().clamp(0, width).long() for edge in (x, x + w))
    top, bottom = (edge.trunc().clamp(0, height).long() for edge in (y, y + h))
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    usable = (right > left) & (bottom > top)
    if not usable.any():
        raise ValueError(f"none of the {len(boxes)} proposals covers a pixel of the {width} x {height} image")
    heat = inside / (w * h).clamp(min=torch.finfo(torch.float64).tiny) ** alpha
    return torch.where(usable, heat, -torch.inf)


def pointing_hit(heatmap: Tensor, box: Box, width: int, height: int) -> bool:
    """Whether the centre of the hottest pixel of the upsampled map (the first of equal ones) lies in the box.

    A flat map points nowhere: no hit. Raises ValueError as `upsampled`.
    """
    heat = upsampled(heatmap, width, height)
    if _flat(heatmap):
        return False
    row, column = _hottest(heat.cpu())
    return _contains(box, column + 0.5, row + 0.5)


def box_from_heatmap(heatmap: Tensor, width: int, height: int, share: float = 0.5) -> Tensor:
    """The box around the region that is connected with the hottest pixel and at least `share` times as hot: [4] fp64.

    Pixels are connected by their sides. Where the map is flat or nowhere positive, nothing stands out: the whole image.

    Raises ValueError as `upsampled`, and for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: expected more than 0 and at most 1")
    heat = upsampled(heatmap, width, height).cpu()
    row, column = _hottest(heat)
    hottest = float(heat[row, column])
    if _flat(heatmap) or hottest <= 0:
        return torch.tensor([0, 0, width, height], dtype=torch.float64)
    left, top, right, bottom = _connected((heat >= share * heat[row, column]).numpy(), row, column)
    return torch.tensor([left, top, right - left, bottom - top], dtype=torch.float64)


@dataclass(frozen=True)
class GroundingHits:
    """What was right for one text."""

    ranked: bool | None  # the best of the proposals has IoU >= 0.5 with the true box; None: there were no proposals
    pointing: bool  # the hottest pixel lies in the true box
    centre: bool  # the centre of the box drawn from the map lies in the true box
    region: bool  # the box drawn from the map has IoU >= 0.5 with the true box


@dataclass(frozen=True)
class GroundingScore:
    """Accuracies of one split in percent; see GroundingHits."""

    ranked: float | None  # what the reference reports; None where no text of the split has proposals
    pointing: float
    centre: float
    region: float
    texts: int


def judge_grounding(heatmap: Tensor, box: Box, width: int, height: int, chosen: Box | None = None) -> GroundingHits:
    """Compares one text's heat map [g, g'] with the true box [4]. Raises ValueError as the functions above.

    chosen: [4] the best of the proposals, or None: the three other measures need none.
    """
    true = _boxes(box)
    ranked = None if chosen is None else bool(reference_iou(true, chosen) >= ENOUGH)
    drawn = box_from_heatmap(heatmap, width, height)
    x, y, w, h = drawn.tolist()
    return GroundingHits(
        ranked=ranked,
        pointing=pointing_hit(heatmap, true, width, height),
        centre=_contains(true, x + w / 2, y + h / 2),
        region=bool(iou(true, drawn) >= ENOUGH),
    )


def score_grounding(hits: Iterable[tuple[str, GroundingHits]]) -> dict[str, GroundingScore]:
    """{split: score} of (split, hits) pairs, splits in the order of their first text.

    A text without proposals counts as a miss of `ranked` where other texts of its split have some.
    """
    splits: dict[str, list[GroundingHits]] = {}
    for split, hit in hits:
        splits.setdefault(split, []).append(hit)
    return {split: _score(own) for split, own in splits.items()}


def _score(hits: list[GroundingHits]) -> GroundingScore:
    def percent(measure: str) -> float:
        return 100.0 * sum(bool(getattr(hit, measure)) for hit in hits) / len(hits)

    proposed = any(hit.ranked is not None for hit in hits)
    return GroundingScore(
        ranked=percent("ranked") if proposed else None,
        pointing=percent("pointing"),
        centre=percent("centre"),
        region=percent("region"),
        texts=len(hits),
    )


def _boxes(boxes: Tensor | Sequence) -> Tensor:
    """[..., 4] fp64: in single precision an IoU of exactly one half may fall on either side."""
    boxes = torch.as_tensor(boxes, dtype=torch.float64)
    if boxes.numel() == 0:
        return boxes.new_zeros(0, 4)
    if boxes.dim() == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes of shape {list(boxes.shape)}: expected [..., 4] with x, y, width, height")
    return boxes


def _share(a: Tensor, b: Tensor, sides: Tensor) -> Tensor:
    """IoU [...] of boxes [..., 4] whose overlap is [..., 2] wide and high."""
    area_a, area_b = (box[..., 2:].clamp(min=0).prod(dim=-1) for box in (a, b))
    both = sides.prod(dim=-1)
    union = area_a + area_b - both
    return torch.where((area_a > 0) & (area_b > 0) & (union > 0), both / union, 0.0)


def _flat(heatmap: Tensor) -> bool:
    return bool(heatmap.min() == heatmap.max())


def _hottest(heat: Tensor) -> tuple[int, int]:
    # NumPy's argmax promises the first of equal ones.
    return divmod(int(heat.numpy().argmax()), heat.shape[1])


def _contains(box: Box, x: float, y: float) -> bool:
    left, top, width, height = _boxes(box).tolist()
    return width > 0 and height > 0 and left <= x <= left + width and top <= y <= top + height


def _connected(hot: np.ndarray, row: int, column: int) -> tuple[int, int, int, int]:
    """Edges (left, top, right, bottom) of the region of `hot` [H, W] bool, connected by sides, around one hot pixel.

    Walks runs of hot pixels, of which a row has few, instead of pixels.
    """
    steps = np.diff(np.pad(hot, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]  # run i is columns starts[i] to ends[i] - 1 of rows[i], sorted by row
    first = np.searchsorted(rows, np.arange(hot.shape[0] + 1))  # the runs of row r: first[r] to first[r + 1]
    in_row = np.arange(first[row], first[row + 1])
    seed = int(in_row[(starts[in_row] <= column) & (column < ends[in_row])][0])
    reached = np.zeros(len(rows), dtype=bool)
    reached[seed] = True
    waiting = [seed]
    while waiting:
        run = waiting.pop()
        for near in (rows[run] - 1, rows[run] + 1):
            if 0 <= near < hot.shape[0]:
                runs = slice(first[near], first[near + 1])
                touching = (starts[runs] < ends[run]) & (starts[run] < ends[runs]) & ~reached[runs]
                reached[runs] |= touching
                waiting.extend((np.nonzero(touching)[0] + first[near]).tolist())
    return int(starts[reached].min()), int(rows[reached].min()), int(ends[reached].max()), int(rows[reached].max()) + 1
