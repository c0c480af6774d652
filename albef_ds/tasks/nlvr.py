"""NLVR2: is a sentence true of two images (models/model_nlvr.py), and the pre-training for it, text assignment.

Text assignment (paper section 4.3, models/model_pretrain_nlvr.py): a caption, two images; it belongs to the left one,
the right one, or neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PairBatch
from albef_ds.model.albef import at_least_fp32, text_spans, unit_features
from albef_ds.model.packing import FusionPlan
from albef_ds.model.pairs import PairTextEncoder
from albef_ds.model.vision import build_vision_encoder
from albef_ds.tasks.classification import Classification
from albef_ds.tasks.task import Task

LABELS = ("False", "True")
SIMILARITY_TEMPERATURE = 0.07  # fixed, in the reference too


class NLVR(Classification):
    classes = len(LABELS)
    images_per_text = 2


@dataclass(frozen=True)
class Assignment:
    """Which two images each of B texts sees, as indices into the batch, and which of them is its own."""

    left: Tensor  # [B] int64
    right: Tensor  # [B] int64
    labels: Tensor  # [B] int64: 0 the left one, 1 the right one, 2 neither


class TextAssigner(nn.Module):
    """The student of text assignment; there is no teacher."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_encoder(config.vision, config.attention)
        self.text_encoder = PairTextEncoder(config.text, config.vision.width, config.attention)
        # Finds similar images and is not trained here: what pre-training learnt.
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim).requires_grad_(False)
        self.ta_head = nn.Linear(config.text.width, 3)

    def enable_checkpointing(self) -> None:
        self.visual_encoder.set_grad_checkpointing(True)
        self.text_encoder.checkpointing = True


class TextAssignment(Task):
    """Pre-trains the paired fusion layers.

    Args:
        assign: [B, B] similarities of the images, divided by the temperature, to an Assignment.
    """

    def __init__(self, config: ModelConfig, assign: Callable[[Tensor], Assignment] | None = None):
        super().__init__(config, TextAssigner(config), None)
        self.assign = assign or draw_assignment

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """A micro-batch of at least three pairs to {"ta"}, a 0-d fp32 tensor."""
        model, text = self.model, text_spans(batch.text)
        image_embeds = model.visual_encoder.forward_features(batch.images)
        with torch.no_grad():
            image_feat = unit_features(model.vision_proj(image_embeds[:, 0].detach()))
            drawn = self.assign(image_feat @ image_feat.T / SIMILARITY_TEMPERATURE)
        seen = torch.cat([image_embeds[drawn.left], image_embeds[drawn.right]])
        hidden = model.text_encoder.encode(batch.text.input_ids, batch.text.position_ids, text)
        first = batch.text.cu_seqlens[:-1].long()
        fused = model.text_encoder.fuse(hidden, FusionPlan.aligned(text), seen, first)
        return {"ta": F.cross_entropy(at_least_fp32(model.ta_head(fused)), drawn.labels)}


def draw_assignment(similarities: Tensor) -> Assignment:
    """A third of the texts each: own image left, own image right, two others. The others are drawn with probability
    softmax(similarities) over all but the own one, two of them without replacement; nothing waits for the device."""
    batch = similarities.shape[0]
    if batch < 3:
        raise ValueError(f"text assignment needs at least 3 samples a forward pass, got {batch}; raise micro_batch")
    own = torch.arange(batch, device=similarities.device)
    masked = similarities.masked_fill(torch.eye(batch, dtype=torch.bool, device=similarities.device), float("-inf"))
    # Gumbel's trick: the two largest of log-probability + noise are two draws without replacement.
    noise = -torch.empty_like(masked).exponential_().log()
    first, second = (masked + noise).topk(2, dim=1).indices.unbind(1)
    labels = torch.randint(3, (batch,), device=similarities.device)
    left = torch.where(labels == 0, own, first)
    right = torch.where(labels == 1, own, torch.where(labels == 0, first, second))
    return Assignment(left, right, labels)
