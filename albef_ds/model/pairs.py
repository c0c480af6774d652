"""A text that looks at two images in turn: ALBEF's encoder for NLVR2 (the reference's models/model_nlvr.py)."""

from __future__ import annotations

from torch import Tensor

from albef_ds.config import TextConfig
from albef_ds.model.packing import FusionPlan
from albef_ds.model.spans import Spans
from albef_ds.model.text import TextEncoder, project_keys


class PairTextEncoder(TextEncoder):
    """Every fusion layer twice: the first of a pair looks at the left image, the second at the right one. The two share
    the projections of cross-attention's keys and values and nothing else."""

    images_per_text = 2

    def __init__(self, config: TextConfig, image_width: int, backend: str = "auto", mlm_head: bool = False):
        super().__init__(config, image_width, backend, mlm_head)
        for left, right in self._layer_pairs():
            for name in ("key", "value"):
                setattr(left.crossattention.self, name, getattr(right.crossattention.self, name))

    @staticmethod
    def fusion_depth(config: TextConfig) -> int:
        return 2 * (config.layers - config.fusion_layer)

    def _layer_pairs(self) -> list[tuple]:
        layers = self.fusion_layers
        return list(zip(layers[::2], layers[1::2], strict=True))

    def fuse(self, hidden: Tensor, plan: FusionPlan, image_embeds: Tensor, rows: Tensor | None) -> Tensor:
        """As TextEncoder.fuse, with image_embeds [2 I, S, Wv], the left images first. Group i of the plan looks at left
        image i and right image i."""
        left_and_right = project_keys([left for left, _ in self._layer_pairs()], image_embeds.flatten(0, 1))
        half = image_embeds.shape[0] // 2
        keys = [
            (key[side], value[side])
            for key, value in left_and_right
            for side in (slice(None, half * image_embeds.shape[1]), slice(half * image_embeds.shape[1], None))
        ]
        spans = Spans.equal(half, image_embeds.shape[1], image_embeds.device)
        return self.cross(self.fusion_layers, hidden, plan, keys, spans, rows)
