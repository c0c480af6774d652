"""ALBEF's pre-training task: image-text contrast, image-text matching, masked language modelling (paper section 3.2).

One step, in the order of a sample's way: both encoders and the teacher, ITC against the queues, hard negatives, one
packed fusion pass for all pairs, ITM and MLM. The reference is models/model_pretrain.py; its numbers are reproduced
within rounding (tests/test_reference_parity.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PackedText, PretrainingBatch
from albef_ds.kernels import queue_contrastive_loss, sample_hard_negatives
from albef_ds.model.albef import ALBEF, at_least_fp32, text_spans
from albef_ds.model.attention import Spans, resolve_backend
from albef_ds.model.packing import FusionPlan
from albef_ds.model.queue import FeatureQueue, gather_features
from albef_ds.model.teacher import Teacher
from albef_ds.tasks.task import Task


class Pretraining(Task):
    """Student, teacher and queues, and the losses between them.

    Args:
        sample_negatives: [B, B] logits to [B] indices, -1 where a row has no valid candidate.
        loss_impl: `impl` of queue_contrastive_loss.
    """

    def __init__(
        self,
        config: ModelConfig,
        sample_negatives: Callable[[Tensor], Tensor] = sample_hard_negatives,
        loss_impl: str = "auto",
    ):
        model = ALBEF(config)
        super().__init__(config, model, Teacher(model, config.momentum, config.teacher_dropout))
        self.queue = FeatureQueue(config.queue_size, config.embed_dim)
        self.sample_negatives = sample_negatives
        self.loss_impl = loss_impl
        self._features: list[tuple[Tensor, Tensor]] = []  # the teacher's, of the micro-batches since the last step

    def start_step(self, alpha: float, measuring: bool = False) -> None:
        self._features.clear()
        super().start_step(alpha, measuring)

    def finish_step(self, applied: bool = True) -> None:
        """The step's features enter the queue."""
        if applied:
            for image_feat, text_feat in self._features:
                self.queue.enqueue(*gather_features(image_feat, text_feat))
        self._features.clear()
        super().finish_step(applied)

    # -- the losses --------------------------------------------------------------------------------------------------

    def forward(self, batch: PretrainingBatch) -> dict[str, Tensor]:
        """A micro-batch to {"itc", "itm", "mlm"}, each a 0-d fp32 tensor."""
        text = text_spans(batch.text)
        both = twice(batch.text)  # every text as it is, then every text masked
        ids = torch.cat([batch.text.input_ids, batch.masked.input_ids])
        clean = slice(0, batch.text.num_tokens)

        image_embeds, image_feat = self.model.encode_image(batch.images)
        text_embeds = self.model.text_encoder.encode(ids, batch.text.position_ids.repeat(2), both)
        text_feat = self.model.project_text(text_embeds[clean], text.cu_seqlens[:-1].long())

        with torch.no_grad():
            image_embeds_m, image_feat_m = self.teacher.encode_image(batch.images)
            text_embeds_m = self.teacher.text_encoder.encode(ids, batch.text.position_ids.repeat(2), both)
            text_feat_m = self.teacher.project_text(text_embeds_m[clean], text.cu_seqlens[:-1].long())

        itc, sim_i2t, sim_t2i = self.contrast(image_feat, text_feat, image_feat_m, text_feat_m)
        self._features.append((image_feat_m, text_feat_m))

        negative_text = self.sample_negatives(sim_i2t)  # [B] for each image
        negative_image = self.sample_negatives(sim_t2i)  # [B] for each text
        plan = self.plan_pairs(both, negative_text, negative_image, image_embeds)
        rows = self.wanted_rows(plan, text, batch.masked.positions)
        fused = self.model.text_encoder.fuse(plan.gather(text_embeds), plan, image_embeds, rows)
        pairs, words = fused.split([3 * len(batch), batch.masked.positions.numel()])
        itm = self.matching(pairs, negative_text, negative_image)

        with torch.no_grad():
            masked_m = text_embeds_m[batch.text.num_tokens :]
            aligned = FusionPlan.aligned(text)
            words_m = self.teacher.text_encoder.fuse(masked_m, aligned, image_embeds_m, batch.masked.positions)
            soft_labels = at_least_fp32(self.teacher.text_encoder.predict_tokens(words_m)).softmax(-1)
        mlm = self.masked_modelling(words, batch.masked.labels, soft_labels)
        return {"itc": itc, "itm": itm, "mlm": mlm}

    def contrast(
        self, image_feat: Tensor, text_feat: Tensor, image_feat_m: Tensor, text_feat_m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC with the teacher's soft targets; on measured steps also the bound on mutual information that it gives."""

        def loss(alpha: float):
            return queue_contrastive_loss(
                image_feat,
                text_feat,
                image_feat_m,
                text_feat_m,
                self.queue.image,
                self.queue.text,
                self.model.temp,
                alpha,
                impl=self.loss_impl,
            )

        if self.measuring:
            with torch.no_grad():
                # InfoNCE proper has hard targets; log(candidates) minus it bounds I(image; text) from below.
                candidates = image_feat_m.shape[0] + self.queue.length
                self.measures["mi_bound"] = math.log(candidates) - loss(0.0)[0]
        return loss(self.alpha)

    def plan_pairs(
        self, both: Spans, negative_text: Tensor, negative_image: Tensor, image_embeds: Tensor
    ) -> FusionPlan:
        """Four pairs a sample: (text, image), (hard text, image), (text, hard image), (masked text, image)."""
        batch = image_embeds.shape[0]
        own = torch.arange(batch, device=image_embeds.device)
        texts = torch.cat([own, negative_text.clamp(min=0), own, own + batch])
        images = torch.cat([own, own, negative_image.clamp(min=0), own])
        capacity = None
        device = image_embeds.device.type
        # Under autocast embeddings leave a LayerNorm in fp32; the attention after the next projection is what counts.
        arithmetic = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image_embeds.dtype
        if resolve_backend(self.config.attention, device, arithmetic) == "flash":
            # How long the negative texts are the GPU alone knows: room for the longest.
            capacity = 3 * both.num_rows // 2 + batch * both.max_length
        return FusionPlan.build(both, texts, images, batch, capacity)

    def wanted_rows(self, plan: FusionPlan, text: Spans, positions: Tensor) -> Tensor:
        """What is read of the fusion pass: [CLS] of the 3 B unmasked pairs, then the P labelled words."""
        start_of_masked = plan.first[3 * text.num :]  # [B] row of each masked text in the fusion pass
        words = start_of_masked[text.run_of_row[positions]] + text.offset_in_run[positions]
        return torch.cat([plan.first[: 3 * text.num], words])

    def matching(self, pairs: Tensor, negative_text: Tensor, negative_image: Tensor) -> Tensor:
        """ITM of the pairs' [CLS] [3 B, W]: the mean over those that exist; where a sample has no negative, its pair
        counts for nothing."""
        batch = negative_text.shape[0]
        logits = at_least_fp32(self.model.itm_head(pairs))
        labels = torch.zeros(3 * batch, dtype=torch.int64, device=logits.device)
        labels[:batch] = 1
        exists = torch.cat([torch.ones_like(negative_text, dtype=torch.bool), negative_text >= 0, negative_image >= 0])
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * exists).sum() / exists.sum()

    def masked_modelling(self, words: Tensor, labels: Tensor, soft_labels: Tensor) -> Tensor:
        """MLM of the labelled words [P, W], distilled with weight alpha; 0 where a batch has none."""
        log_probabilities = at_least_fp32(self.model.text_encoder.predict_tokens(words)).log_softmax(-1)
        hard = F.nll_loss(log_probabilities, labels, reduction="sum")
        soft = -(soft_labels * log_probabilities).sum()
        return ((1 - self.alpha) * hard + self.alpha * soft) / max(1, labels.numel())


def twice(text: PackedText) -> Spans:
    """The spans of the batch's texts followed by the same texts again."""
    cu_seqlens = torch.cat([text.cu_seqlens, text.cu_seqlens[1:] + text.num_tokens])
    return Spans(cu_seqlens, text.max_length, 2 * text.num_tokens)
