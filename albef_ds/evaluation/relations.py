"""Phrases that say where a thing is by naming another: "the star left of the blue square".

The heat map of such a phrase shows what tells its image from others, often the other thing. So every thing named gets
a heat map of its own, and the places of the proposals decide what is left of what, as in ReCLIP (Subramanian et al.,
2022, arXiv:2204.05991): a box is as likely as its own heat says, times the heat of the boxes that it is so related to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from albef_ds.evaluation.boxes import heat_of_proposals

# Which side of the other's centre a thing's centre lies on: (x or y, sign of the difference).
_SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
_RELATION = re.compile(
    r" (?:(?:that|which) is |that's )?"
    r"(?:(?:(?:to|on|at) the )?(?P<side>left|right)(?: (?:hand )?side)? of"
    r"|(?P<above>above|on top of)|(?P<below>below|beneath|under|underneath)) ",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Chain:
    """Things, each in a relation to the one named next: what is meant is the first."""

    things: tuple[str, ...]  # two or more
    relations: tuple[str, ...]  # "left", "right", "above", "below"; one fewer


def chain_of(text: str) -> Chain | None:
    """The things that a phrase puts in relation; None where it has no such relation between two things."""
    text, things, relations, begin = " ".join(text.split()), [], [], 0
    for match in _RELATION.finditer(text):
        things.append(text[begin : match.start()].strip())
        relations.append((match["side"] or ("above" if match["above"] else "below")).lower())
        begin = match.end()
    things.append(text[begin:].strip())
    return Chain(tuple(things), tuple(relations)) if relations and all(things) else None


def rank_related(
    relations: Sequence[str], heatmaps: Sequence[Tensor], proposals: Tensor | Sequence, width: int, height: int
) -> int:
    """Which proposal is the first thing of a chain; the first of equal ones.

    Args:
        relations: of each thing to the next, see Chain.
        heatmaps: [g, g'] of each thing.
        proposals: [N, 4] boxes x, y, width, height in pixels.
        width, height: of the image, pixels.

    Where no two proposals with any heat are so related, the relation is passed over. Raises ValueError as
    `rank_proposals`.
    """
    boxes = torch.as_tensor(proposals, dtype=torch.float64)
    *others, likely = (_likelihood(heat, boxes, width, height) for heat in heatmaps)
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    for relation, own in zip(reversed(relations), reversed(others), strict=True):
        axis, sign = _SIDES[relation]
        related = (centres[:, None, axis] - centres[None, :, axis]) * sign > 0  # [N, N]
        both = own * (related.double() @ likely)
        likely = both / both.sum() if both.sum() > 0 else own
    return int((likely == likely.max()).nonzero()[0])


def _likelihood(heatmap: Tensor, boxes: Tensor, width: int, height: int) -> Tensor:
    """[N] fp64, sums to 1: each proposal's share of the heat; equal shares where there is none."""
    heat = heat_of_proposals(heatmap, boxes, width, height).cpu()
    usable = torch.isfinite(heat)
    heat = heat.clamp(min=0)
    return heat / heat.sum() if heat.sum() > 0 else usable.double() / usable.sum()
