"""Draws test images for a report: reduced, heat maps laid over them, boxes around what was meant and what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from albef_ds.evaluation.examples import BoxOf

THUMBNAIL = 320  # pixels of the longer side
HEAT_COLOURS = "cividis"  # dark blue to yellow; made to look the same to the colour-blind
COLD, HOT = 0.25, 0.7  # how much of the picture the heat map hides
TRUE, FOUND, CASING = "#009e73", "#e69f00", "#ffffff"
LINE = 3  # pixels
DASH = 9  # pixels, and as many between two


@dataclass(frozen=True)
class Drawn:
    image: Image.Image
    faults: tuple[str, ...]  # what could not be drawn, and why


def reduced(image: Image.Image) -> Image.Image:
    """At most THUMBNAIL pixels wide and high; smaller images stay as they are."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image


def annotated(
    image: Image.Image,
    heatmap: Sequence[Sequence[float]] | None = None,
    true_box: BoxOf | None = None,
    found_box: BoxOf | None = None,
) -> Drawn:
    """THUMBNAIL pixels at its longer side, small images enlarged: lines and heat are drawn at the size they are seen.

    Args:
        heatmap: [g][g'] over the whole image, 0 or more; the hottest place gets the brightest colour.
        true_box, found_box: x, y, width, height in pixels of `image`; what lies beyond its edge is cut off.
    """
    scale = THUMBNAIL / max(image.size)
    picture = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    faults = []
    if heatmap is not None:
        heat, fault = _heat(heatmap)
        picture = picture if heat is None else _overlaid(picture, heat)
        faults += [fault] if fault else []
    for name, box, colour, dash in (("true", true_box, TRUE, None), ("found", found_box, FOUND, DASH)):
        if box is None:
            continue
        corners, fault = _corners(box, image.size, picture.size)
        faults += [f"The {name} box {fault}."] if fault else []
        if corners is not None:
            _draw(picture, corners, colour, dash)
    return Drawn(picture, tuple(faults))


def _heat(heatmap: Sequence[Sequence[float]]) -> tuple[np.ndarray | None, str]:
    """[g, g'] from 0 to 1."""
    try:
        heat = np.array(heatmap, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):  # rows of different lengths, or no numbers
        heat = np.empty(0)
    if heat.ndim != 2 or not heat.size:
        return None, "The heat map is no table of numbers."
    if not np.isfinite(heat).all():
        return None, "The heat map has values that are no numbers."
    heat = heat.clip(min=0)
    if not heat.max():
        return None, "The heat map is zero everywhere."
    return heat / heat.max(), ""


def _overlaid(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    smooth = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    smooth = np.asarray(smooth).clip(0, 1)  # bicubic overshoots  [H, W]
    colours = 255 * matplotlib.colormaps[HEAT_COLOURS](smooth)[..., :3]
    opacity = (COLD + (HOT - COLD) * smooth)[..., None]
    mixed = (1 - opacity) * np.asarray(picture, np.float64) + opacity * colours
    return Image.fromarray(mixed.round().astype(np.uint8))


def _corners(
    box: BoxOf, size: tuple[int, int], drawn: tuple[int, int]
) -> tuple[tuple[float, float, float, float] | None, str]:
    """Left, top, right, bottom in the drawn picture, as far as they lie within it; and what is wrong with the box."""
    try:
        x, y, w, h = (float(value) for value in box)
    except (ValueError, TypeError, OverflowError):
        return None, "is no four numbers"
    if not all(map(math.isfinite, (x, y, w, h))) or w < 0 or h < 0:
        return None, f"({x:g}, {y:g}, {w:g}, {h:g}) is none"
    width, height = size
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return None, f"({x:g}, {y:g}, {w:g}, {h:g}) lies outside the image of {width} x {height} pixels"
    beyond = x < 0 or y < 0 or x + w > width + 1 or y + h > height + 1  # a pixel more is rounding
    inset = LINE / 2  # a line along the edge is seen whole
    left, right = (_within(v * drawn[0] / width, inset, drawn[0] - 1 - inset) for v in (max(x, 0), min(x + w, width)))
    top, bottom = (_within(v * drawn[1] / height, inset, drawn[1] - 1 - inset) for v in (max(y, 0), min(y + h, height)))
    return (left, top, right, bottom), "reaches beyond the image" if beyond else ""


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), max(low, high))


def _draw(picture: Image.Image, corners: tuple[float, float, float, float], colour: str, dash: int | None) -> None:
    left, top, right, bottom = corners
    canvas = ImageDraw.Draw(picture)
    around = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    pieces = [piece for start, end in pairwise(around) for piece in _pieces(start, end, dash)]
    for width, ink in ((LINE + 2, CASING), (LINE, colour)):  # the casing first: seen on any ground
        for piece in pieces:
            canvas.line(piece, fill=ink, width=width)


def _pieces(start: tuple[float, float], end: tuple[float, float], dash: int | None):
    """One line, or the dashes of it; both ends have one, so that corners are closed."""
    length = math.dist(start, end)
    if dash is None or length <= dash:
        return [(start, end)]
    count = 2 * round((length / dash - 1) / 2) + 1  # odd: dash, space, …, dash
    points = [
        (start[0] + (end[0] - start[0]) * i / count, start[1] + (end[1] - start[1]) * i / count)
        for i in range(count + 1)
    ]
    return list(pairwise(points))[::2]
