"""ALBEF's network: image encoder, text and fusion encoder, projections, matching head (paper section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PackedText
from albef_ds.model.packing import FusionPlan
from albef_ds.model.spans import Spans
from albef_ds.model.text import TextEncoder
from albef_ds.model.vision import build_vision_encoder


class Encoders(nn.Module):
    """The part of ALBEF that student and teacher share: both encoders and their projections."""

    PARTS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
    visual_encoder: nn.Module
    text_encoder: TextEncoder
    vision_proj: nn.Linear
    text_proj: nn.Linear

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, R, R] to embeddings [B, S, Wv] and the [CLS] feature [B, E], fp32, of unit length.

        S is 1 + the image's patches; fewer where a student in training drops some (model.options.token_drop)."""
        image_embeds = self.visual_encoder.forward_features(images)
        return image_embeds, unit_features(self.vision_proj(image_embeds[:, 0]))

    def project_text(self, text_embeds: Tensor, first: Tensor) -> Tensor:
        """Embeddings [T, W] and the rows of the [CLS] tokens [B] to features [B, E], fp32, of unit length."""
        return unit_features(self.text_proj(text_embeds[first]))

    def encode_text(self, text: PackedText) -> tuple[Tensor, Tensor]:
        """A packed batch to embeddings [T, W] and features [B, E]."""
        spans = text_spans(text)
        text_embeds = self.text_encoder.encode(text.input_ids, text.position_ids, spans)
        return text_embeds, self.project_text(text_embeds, spans.cu_seqlens[:-1].long())


class ALBEF(Encoders):
    """The student. Parameter names are the reference's, so a state dict needs no translation but the queues'.

    Args:
        mlm_head: whether the text encoder can predict words; only pre-training needs it.
    """

    def __init__(self, config: ModelConfig, mlm_head: bool = True):
        super().__init__()
        self.config = config
        self.visual_encoder = build_vision_encoder(config.vision, config.attention, config.options.token_drop)
        self.text_encoder = TextEncoder(config.text, config.vision.width, config.attention, mlm_head)
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.itm_head = nn.Linear(config.text.width, 2)
        # Shape [1], where the reference has []: DeepSpeed 0.19 fails on parameters without a dimension.
        self.temp = nn.Parameter(torch.full((1,), config.temperature))

    def enable_checkpointing(self) -> None:
        """Recomputes every layer's activations in the backward pass instead of keeping them."""
        self.visual_encoder.set_grad_checkpointing(True)
        self.text_encoder.checkpointing = True

    def match(
        self, text_embeds: Tensor, text: PackedText, text_index: Tensor, image_embeds: Tensor, image_index: Tensor
    ) -> Tensor:
        """ITM logits [N, 2] (not matching, matching) of N pairs (text_index[j], image_index[j]), in any order.

        Args:
            text_embeds: [T, W] of `text`, by encode_text.
            image_embeds: [I, S, Wv], by encode_image.
        """
        plan = FusionPlan.build(text_spans(text), text_index, image_index, image_embeds.shape[0])
        return self.itm_head(self.text_encoder.fuse(plan.gather(text_embeds), plan, image_embeds, plan.first))


def text_spans(text: PackedText) -> Spans:
    return Spans(text.cu_seqlens, text.max_length, text.num_tokens)


def unit_features(projected: Tensor) -> Tensor:
    """L2 normalisation in fp32: similarities are divided by a small temperature, which magnifies rounding."""
    return F.normalize(at_least_fp32(projected), dim=-1)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
