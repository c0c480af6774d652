"""Where a phrase points: Grad-CAM of a model that learnt from image-text pairs alone, against true boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from albef_ds.data.task_samples import TaskSample, TaskSamples, stacked, texts_of
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.boxes import box_from_heatmap, judge_grounding, rank_proposals, score_grounding
from albef_ds.evaluation.examples import Example, spread
from albef_ds.evaluation.heatmaps import itc_heatmaps, itm_heatmaps
from albef_ds.evaluation.samples import evaluating, over_ranks
from albef_ds.model.albef import ALBEF


@dataclass(frozen=True)
class Grounded:
    heatmap: tuple[tuple[float, ...], ...]  # [g][g]

    def tensor(self) -> Tensor:
        return Tensor(self.heatmap)


def ground_all(
    model: ALBEF, samples: TaskSamples, device, *, by: str, layer: int | None, size: int, workers: int
) -> list[Grounded]:
    """The heat map of every phrase, on all ranks. by: "itm" or "itc"."""
    look = {"itm": itm_heatmaps, "itc": itc_heatmaps}[by]

    def run(block: list[TaskSample]) -> list[Grounded]:
        try:
            maps = look(model, stacked(block).to(device), texts_of(block).to(device), layer).texts
        except ValueError as error:  # a layer that there is not
            raise EvaluationError(f"evaluation.heatmap_layer: {error}") from error
        if not torch.isfinite(maps).all():
            raise EvaluationError("the model gives NaN or infinity in a heat map; the weights are probably broken")
        return [Grounded(tuple(map(tuple, grid))) for grid in maps.float().cpu().tolist()]

    with evaluating(model, device):
        return over_ranks(samples, run, size, workers, "phrases")


def score(samples: TaskSamples, found: Sequence[Grounded]) -> dict:
    """Percent by split, and of "all": `ranked` (the reference's: best proposal, IoU >= 0.5), `pointing`, `centre`,
    `region`; see albef_ds.evaluation.boxes.GroundingHits."""
    hits = []
    for i, grounded in enumerate(found):
        e = samples.entries[i]
        hits.append((e.split, judge_grounding(grounded.tensor(), e.box, e.width, e.height, e.proposals)))
    everything = [("all", hit) for _, hit in hits]
    return {split: asdict(value) for split, value in score_grounding([*everything, *hits]).items()}


def examples_of(samples: TaskSamples, found: Sequence[Grounded], wanted: int) -> list[Example]:
    shown = []
    for i in spread(len(found), wanted):
        e, heat = samples.entries[i], found[i].tensor()
        hits = judge_grounding(heat, e.box, e.width, e.height, e.proposals)
        if e.proposals:
            box, right = e.proposals[rank_proposals(heat, e.proposals, e.width, e.height)], bool(hits.ranked)
        else:
            box, right = tuple(box_from_heatmap(heat, e.width, e.height).tolist()), hits.region
        said = "best of the proposals" if e.proposals else "box around the hottest region"
        shown.append(Example(samples.paths(e), e.text, said, None, right, found[i].heatmap, tuple(e.box), tuple(box)))
    return shown
