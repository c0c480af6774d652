"""A picture of where a text is found: the image, the whole text's heat over it, and that of each word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from albef_ds.inference.model import Heatmap

COLUMNS = 4
SIDE = 2.6  # inches of a panel
LONGEST = 480  # pixels of an image's longer side on a sheet
HEAT = colormaps["inferno"]


def sheet(image: Image.Image, text: str, heatmap: Heatmap, out: Path) -> Path:
    """Writes a PNG. Every overlay is brightest at its own maximum: it says where, not how much."""
    image = small(image)
    panels = [("", image), ("the whole text", overlay(image, heatmap.whole))]
    panels += [(word, overlay(image, heat)) for word, heat in zip(heatmap.words, heatmap.maps, strict=True)]
    return write_grid(panels, text, out, min(COLUMNS, len(panels)))


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The image, coloured by heat [g, g]; a map of zeros leaves it dark."""
    peak = float(heat.max())
    scaled = (heat / peak if peak > 0 else heat).clamp(0, 1)
    grey = Image.fromarray((scaled.numpy() * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    share = np.asarray(grey, dtype=np.float32)[..., None] / 255
    colour = HEAT(share[..., 0])[..., :3] * 255
    opacity = 0.35 + 0.45 * share  # dimmed everywhere, so that the heat is what one sees
    mixed = np.asarray(image.convert("RGB"), dtype=np.float32) * (1 - opacity) + colour * opacity
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def small(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def write_grid(panels: Sequence[tuple[str, Image.Image]], title: str, out: Path, columns: int) -> Path:
    """Titled pictures, row by row. Titles are anybody's text: nothing in them is read as a formula."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(SIDE * columns, SIDE * rows + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(shown(title, 28 * columns), fontsize=12, parse_math=False)
    for place, (name, picture) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(picture)
        axes.set_title(shown(name, 30), fontsize=10, parse_math=False)
        axes.set_axis_off()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out


def shown(text: str, longest: int | None = None) -> str:
    """One line that a terminal or a picture can show: without control characters and halves of characters."""
    text = " ".join(str(text).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"
