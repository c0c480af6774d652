"""What an evaluation shows beside its numbers: test images, what the model said of them, what was right."""

from __future__ import annotations

from dataclasses import dataclass

BoxOf = tuple[float, float, float, float]  # x, y, width, height in pixels of the original image


@dataclass(frozen=True)
class Example:
    """One question, sentence or phrase about one image or two."""

    images: tuple[str, ...]  # paths
    text: str
    found: str
    expected: str | None  # None: nobody knows
    right: bool | None
    heatmap: tuple[tuple[float, ...], ...] | None = None  # [g][g], over the whole first image
    true_box: BoxOf | None = None
    found_box: BoxOf | None = None


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` of `total` places, evenly spread: which examples are shown does not depend on the number of ranks."""
    wanted = min(wanted, total)
    return sorted({round(i * (total - 1) / max(1, wanted - 1)) for i in range(wanted)})
