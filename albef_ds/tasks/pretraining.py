"""ALBEF's pre-training task: image-text contrast, image-text matching, masked language modelling (paper section 3.2).

One step, in the order of a sample's way: both encoders and the teacher, ITC against the queues, hard negatives, one
packed fusion pass for all pairs, ITM and MLM. The reference is models/model_pretrain.py; its numbers are reproduced
within rounding (tests/test_reference_parity.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from albef_ds.data.batch import PackedText, PretrainingBatch
from albef_ds.model.albef import at_least_fp32, text_spans
from albef_ds.model.packing import FusionPlan
from albef_ds.model.spans import Spans
from albef_ds.tasks.contrastive import Contrastive, three_pairs
from albef_ds.tasks.negatives import Pool


class Pretraining(Contrastive):
    """Student, teacher and queues, and the three losses between them."""

    mlm_head = True

    def forward(self, batch: PretrainingBatch) -> dict[str, Tensor]:
        """A micro-batch to {"itc", "itm", "mlm"}, each a 0-d fp32 tensor."""
        batch = self.mix(batch)
        everyone = self.meet(batch.text)
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

        features = (image_feat, text_feat, image_feat_m, text_feat_m)
        itc, *sims = self.contrast(*features)
        own = Pool(text_embeds, both, image_embeds)
        pool, negative_text, negative_image = self.negatives(own, everyone, features, sims)
        plan = self.plan_pairs(pool, text, negative_text, negative_image)
        rows = self.wanted_rows(plan, text, batch.masked.positions)
        fused = self.model.text_encoder.fuse(plan.gather(pool.text_embeds), plan, pool.image_embeds, rows)
        pairs, words = fused.split([3 * len(batch), batch.masked.positions.numel()])
        itm = self.matching(pairs, negative_text, negative_image)

        with torch.no_grad():
            masked_m = text_embeds_m[batch.text.num_tokens :]
            aligned = FusionPlan.aligned(text)
            words_m = self.teacher.text_encoder.fuse(masked_m, aligned, image_embeds_m, batch.masked.positions)
            soft_labels = at_least_fp32(self.teacher.text_encoder.predict_tokens(words_m)).softmax(-1)
        mlm = self.masked_modelling(words, batch.masked.labels, soft_labels)
        return {"itc": itc, "itm": itm, "mlm": mlm}

    def plan_pairs(self, pool: Pool, text: Spans, negative_text: Tensor, negative_image: Tensor) -> FusionPlan:
        """Four pairs a sample: (text, image), (hard text, image), (text, hard image), (masked text, image)."""
        batch, num_images = text.num, pool.image_embeds.shape[0]
        own = torch.arange(batch, device=negative_text.device)
        texts, images = three_pairs(negative_text, negative_image)
        # How long the negative texts are the GPU alone knows: room for the longest.
        room = self.room(3 * text.num_rows + batch * pool.spans.max_length, pool.image_embeds)
        return FusionPlan.build(pool.spans, torch.cat([texts, own + batch]), torch.cat([images, own]), num_images, room)

    def wanted_rows(self, plan: FusionPlan, text: Spans, positions: Tensor) -> Tensor:
        """What is read of the fusion pass: [CLS] of the 3 B unmasked pairs, then the P labelled words."""
        start_of_masked = plan.first[3 * text.num :]  # [B] row of each masked text in the fusion pass
        words = start_of_masked[text.run_of_row[positions]] + text.offset_in_run[positions]
        return torch.cat([plan.first[: 3 * text.num], words])

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
