"""Fine-tuning for image-text retrieval: ITC with every caption of an image as a positive, and ITM
(models/model_retrieval.py).

Ids say which pairs belong together, in the batch and in the queue; a sample of the same id is never a hard negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from albef_ds.data.batch import PairBatch
from albef_ds.model.albef import text_spans
from albef_ds.model.packing import FusionPlan
from albef_ds.tasks.contrastive import Contrastive, three_pairs
from albef_ds.tasks.negatives import Pool


class Retrieval(Contrastive):
    """Student, teacher and queues, and the losses between them. Grounding is trained with it too."""

    keeps_ids = True

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """A micro-batch to {"itc", "itm"}, each a 0-d fp32 tensor."""
        batch = self.mix(batch)
        everyone = self.meet(batch.text, batch.ids)
        text = text_spans(batch.text)
        image_embeds, image_feat = self.model.encode_image(batch.images)
        text_embeds, text_feat = self.model.encode_text(batch.text)
        with torch.no_grad():
            _, image_feat_m = self.teacher.encode_image(batch.images)
            _, text_feat_m = self.teacher.encode_text(batch.text)

        features = (image_feat, text_feat, image_feat_m, text_feat_m)
        itc, *sims = self.contrast(*features, batch.ids)
        own = Pool(text_embeds, text, image_embeds)
        pool, negative_text, negative_image = self.negatives(own, everyone, features, sims, batch.ids)
        room = self.room(2 * text.num_rows + text.num * pool.spans.max_length, image_embeds)
        texts, images = three_pairs(negative_text, negative_image)
        plan = FusionPlan.build(pool.spans, texts, images, pool.image_embeds.shape[0], room)
        pairs = self.model.text_encoder.fuse(plan.gather(pool.text_embeds), plan, pool.image_embeds, plan.first)
        return {"itc": itc, "itm": self.matching(pairs, negative_text, negative_image)}
