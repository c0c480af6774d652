"""From scores to the places of the right answers, and from places to recall."""

from __future__ import annotations

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)


def ordered(scores: Tensor) -> Tensor:
    """[Q, C] scores to [Q, C] candidates, best first; of equal ones the lower index first, on every device."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def first_right(right: Tensor) -> Tensor:
    """[Q, C] bool, candidates in their order, a right one in every row: the 0-based place of the first such."""
    return right.to(torch.uint8).argmax(dim=1)


def reranked(right: Tensor, place: Tensor, scores: Tensor) -> Tensor:
    """Places after the first k candidates of each query were ordered anew by `scores`.

    Args:
        right: [Q, k] bool, the first k candidates in their old order.
        place: [Q] old place of the first right candidate among all. Candidates beyond k keep their places.
        scores: [Q, k] new scores; equal ones keep their old order.
    """
    new = first_right(right.gather(1, ordered(scores)))
    return torch.where(right.any(dim=1), new, place)


def recall(text_places: Tensor, image_places: Tensor) -> dict[str, float]:
    """Recall in percent.

    Args:
        text_places: [N] for each image, the place of its best caption (text retrieval, "tr").
        image_places: [M] for each text, the place of its image (image retrieval, "ir").
    """
    result = {}
    for name, places in (("tr", text_places), ("ir", image_places)):
        at = {f"{name}@{k}": 100.0 * (places < k).double().mean().item() for k in RECALL_AT}
        result |= at | {f"{name}_mean": sum(at.values()) / len(at)}
    return result | {"mean": (result["tr_mean"] + result["ir_mean"]) / 2}
