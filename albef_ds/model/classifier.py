"""A label for a text and its image, or its two images: ALBEF with a head of two layers on the fused [CLS].

The reference's models/model_ve.py (entailment: one image, three classes) and models/model_nlvr.py (two and two).
"""

from __future__ import annotations

from torch import Tensor, nn

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PackedText
from albef_ds.model.albef import text_spans
from albef_ds.model.packing import FusionPlan
from albef_ds.model.pairs import PairTextEncoder
from albef_ds.model.teacher import Momentum
from albef_ds.model.text import TextEncoder
from albef_ds.model.vision import build_vision_encoder


class FusedText(nn.Module):
    """An image encoder and a text encoder without projections; the part that the tasks after pre-training share."""

    visual_encoder: nn.Module
    text_encoder: TextEncoder

    def fuse_all(self, images: Tensor, text: PackedText) -> Tensor:
        """Hidden states [T, W] of every token of B texts, text i with image i. Where there are fewer images, the first
        B / I texts look at image 0, and so on; where the encoder takes two, at images i and I / 2 + i."""
        return self._fuse(images, text, None)

    def fuse_first(self, images: Tensor, text: PackedText) -> Tensor:
        """The same, of each text's [CLS] alone: [B, W]."""
        return self._fuse(images, text, text.cu_seqlens[:-1].long())

    def _fuse(self, images: Tensor, text: PackedText, rows: Tensor | None) -> Tensor:
        spans = text_spans(text)
        image_embeds = self.visual_encoder.forward_features(images)
        hidden = self.text_encoder.encode(text.input_ids, text.position_ids, spans)
        plan = FusionPlan.grouped(spans, image_embeds.shape[0] // self.text_encoder.images_per_text)
        return self.text_encoder.fuse(hidden, plan, image_embeds, rows)


class ClassifierParts(FusedText):
    """What student and teacher share."""

    PARTS = ("visual_encoder", "text_encoder", "cls_head")
    cls_head: nn.Sequential

    def classify(self, images: Tensor, text: PackedText) -> Tensor:
        """Logits [B, C]. Images [B, 3, R, R], or [2 B, 3, R, R], the left ones first."""
        return self.cls_head(self.fuse_first(images, text))


class Classifier(ClassifierParts):
    """The student.

    Args:
        classes: C.
        images_per_text: 1 or 2.
    """

    def __init__(self, config: ModelConfig, classes: int, images_per_text: int = 1):
        super().__init__()
        self.config = config
        encoder = {1: TextEncoder, 2: PairTextEncoder}[images_per_text]
        width = config.text.width
        self.visual_encoder = build_vision_encoder(config.vision, config.attention)
        self.text_encoder = encoder(config.text, config.vision.width, config.attention, mlm_head=False)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))

    def enable_checkpointing(self) -> None:
        self.visual_encoder.set_grad_checkpointing(True)
        self.text_encoder.checkpointing = True


class ClassifierTeacher(Momentum, ClassifierParts):
    """The momentum copy."""
