"""Where a phrase points: Grad-CAM of a model that learnt from image-text pairs alone, against true boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from albef_ds.data.batch import PackedText
from albef_ds.data.task_entries import ReferringEntry
from albef_ds.data.task_samples import TaskSample, TaskSamples, stacked, texts_of
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.boxes import box_from_heatmap, judge_grounding, rank_proposals, score_grounding
from albef_ds.evaluation.examples import Example, spread
from albef_ds.evaluation.heatmaps import itc_heatmaps, itm_heatmaps
from albef_ds.evaluation.relations import chain_of, rank_related
from albef_ds.evaluation.samples import evaluating, over_ranks
from albef_ds.model.albef import ALBEF

Grid = tuple[tuple[float, ...], ...]  # [g][g]


@dataclass(frozen=True)
class Grounded:
    heatmap: Grid
    things: tuple[Grid, ...] = ()  # of each thing of the phrase's chain (albef_ds/evaluation/relations.py)

    def tensor(self) -> Tensor:
        return Tensor(self.heatmap)

    def choice(self, entry: ReferringEntry) -> tuple[float, ...] | None:
        """The best of the entry's proposals, by the places of the things named where there are maps of them; None:
        there are no proposals."""
        if not entry.proposals:
            return None
        place = (entry.proposals, entry.width, entry.height)
        if self.things:
            return entry.proposals[rank_related(chain_of(entry.text).relations, list(map(Tensor, self.things)), *place)]
        return entry.proposals[rank_proposals(self.tensor(), *place)]


def ground_all(
    model: ALBEF,
    samples: TaskSamples,
    device,
    *,
    by: str,
    layer: int | None,
    size: int,
    workers: int,
    relations: bool = False,
) -> list[Grounded]:
    """The heat map of every phrase, on all ranks.

    Args:
        by: "itm" or "itc".
        relations: whether the things of a phrase such as "the star left of the blue square" get maps of their own.
    """
    look = {"itm": itm_heatmaps, "itc": itc_heatmaps}[by]

    def maps(images: Tensor, text: PackedText) -> list[Grid]:
        try:
            found = look(model, images, text.to(device), layer).texts
        except ValueError as error:  # a layer that there is not
            raise EvaluationError(f"evaluation.heatmap_layer: {error}") from error
        if not torch.isfinite(found).all():
            raise EvaluationError("the model gives NaN or infinity in a heat map; the weights are probably broken")
        return [tuple(map(tuple, grid)) for grid in found.float().cpu().tolist()]

    def run(block: list[TaskSample]) -> list[Grounded]:
        images = stacked(block).to(device)
        things = _maps_of_things(samples, block, images, maps) if relations else [()] * len(block)
        return [Grounded(*found) for found in zip(maps(images, texts_of(block)), things, strict=True)]

    with evaluating(model, device):
        return over_ranks(samples, run, size, workers, "phrases")


def _maps_of_things(
    samples: TaskSamples, block: list[TaskSample], images: Tensor, maps: Callable[[Tensor, PackedText], list[Grid]]
) -> list[tuple[Grid, ...]]:
    chains = [chain_of(sample.entry.text) for sample in block]
    named = [(i, thing) for i, chain in enumerate(chains) if chain for thing in chain.things]
    if not named:
        return [()] * len(block)
    rows = torch.tensor([i for i, _ in named], device=images.device)
    found = iter(maps(images[rows], PackedText.from_lists([samples.tokens(thing) for _, thing in named])))
    return [tuple(next(found) for _ in chain.things) if chain else () for chain in chains]


def score(samples: TaskSamples, found: Sequence[Grounded]) -> dict:
    """Percent by split, and of "all": `ranked` (the reference's: best proposal, IoU >= 0.5), `pointing`, `centre`,
    `region`; see albef_ds.evaluation.boxes.GroundingHits."""
    hits = []
    for i, grounded in enumerate(found):
        e = samples.entries[i]
        hits.append((e.split, judge_grounding(grounded.tensor(), e.box, e.width, e.height, grounded.choice(e))))
    everything = [("all", hit) for _, hit in hits]
    return {split: asdict(value) for split, value in score_grounding([*everything, *hits]).items()}


def examples_of(samples: TaskSamples, found: Sequence[Grounded], wanted: int) -> list[Example]:
    shown = []
    for i in spread(len(found), wanted):
        e, heat = samples.entries[i], found[i].tensor()
        chosen = found[i].choice(e)
        hits = judge_grounding(heat, e.box, e.width, e.height, chosen)
        if chosen is not None:
            box, right = chosen, bool(hits.ranked)
        else:
            box, right = tuple(box_from_heatmap(heat, e.width, e.height).tolist()), hits.region
        said = "best of the proposals" if e.proposals else "box around the hottest region"
        shown.append(Example(samples.paths(e), e.text, said, None, right, found[i].heatmap, tuple(e.box), tuple(box)))
    return shown
