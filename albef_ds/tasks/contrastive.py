"""What pre-training and retrieval share: features against the momentum queues (ITC) and hard negatives (ITM)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PackedText, PairBatch, PretrainingBatch
from albef_ds.data.mixgen import mixgen
from albef_ds.kernels import queue_contrastive_loss, sample_hard_negatives
from albef_ds.model.albef import ALBEF, at_least_fp32
from albef_ds.model.queue import FeatureQueue, gather_features
from albef_ds.model.teacher import Teacher
from albef_ds.tasks.negatives import AllRanks, Pool, across_ranks
from albef_ds.tasks.task import Task


class Contrastive(Task):
    """Student, teacher and queues, and the two losses over pairs.

    Args:
        sample_negatives: ([B, B] logits, ids [B] or None) to [B] indices, -1 where a row has no valid candidate.
        loss_impl: `impl` of queue_contrastive_loss.
    """

    mlm_head = False
    keeps_ids = False  # whether the queue remembers which image a feature is of

    def __init__(
        self,
        config: ModelConfig,
        sample_negatives: Callable[[Tensor, Tensor | None], Tensor] = sample_hard_negatives,
        loss_impl: str = "auto",
    ):
        model = ALBEF(config, self.mlm_head)
        super().__init__(config, model, Teacher(model, config.momentum, config.teacher_dropout))
        self.queue = FeatureQueue(config.queue_size, config.embed_dim, self.keeps_ids)
        self.sample_negatives = sample_negatives
        self.loss_impl = loss_impl
        # The teacher's features, and ids, of the micro-batches since the last step.
        self._features: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def start_step(self, alpha: float, measuring: bool = False) -> None:
        self._features.clear()
        super().start_step(alpha, measuring)

    def finish_step(self, applied: bool = True) -> None:
        """The step's features enter the queue, in the order of the global batch: a rank's micro-batches are consecutive
        in it."""
        if applied and self._features:
            image_feat, text_feat, ids = map(_joined, zip(*self._features, strict=True))
            self.queue.enqueue(*gather_features(image_feat, text_feat, ids))
        self._features.clear()
        super().finish_step(applied)

    def mix(self, batch: PretrainingBatch | PairBatch) -> PretrainingBatch | PairBatch:
        """The batch as it is learnt from: with `model.options.mixgen`, some of its pairs mixed."""
        share = self.config.options.mixgen
        return mixgen(batch, share) if share and self.training else batch

    def meet(self, text: PackedText, ids: Tensor | None = None) -> AllRanks | None:
        """With `model.options.negatives: all`, what the ranks must know of each other; otherwise None."""
        return AllRanks.meet(text, ids) if across_ranks(self.config.options.negatives) else None

    def negatives(
        self,
        pool: Pool,
        everyone: AllRanks | None,
        features: tuple[Tensor, Tensor, Tensor, Tensor],
        sims: tuple[Tensor, Tensor],
        *ids: Tensor,
    ) -> tuple[Pool, Tensor, Tensor]:
        """A hard text for each image and a hard image for each text, by similarity: indices [B] into the returned pool,
        -1 where there is none.

        Args:
            features: [B, D] of the student's images and texts, and of the teacher's.
            sims: [B, B] logits of this rank's own candidates.
        """
        if everyone is not None:
            return everyone.negatives(pool, features, self.model.temp, self.sample_negatives)
        hard_text, hard_image = (self.sample_negatives(sim, *ids) for sim in sims)
        return pool, hard_text, hard_image

    def contrast(
        self,
        image_feat: Tensor,
        text_feat: Tensor,
        image_feat_m: Tensor,
        text_feat_m: Tensor,
        ids: Tensor | None = None,
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
                ids,
                self.queue.ids if ids is not None else None,
                impl=self.loss_impl,
            )

        self._features.append((image_feat_m, text_feat_m, ids))
        if self.measuring and ids is None:
            with torch.no_grad():
                # InfoNCE proper has hard targets; log(candidates) minus it bounds I(image; text) from below.
                candidates = image_feat_m.shape[0] + self.queue.length
                self.measures["mi_bound"] = math.log(candidates) - loss(0.0)[0]
        return loss(self.alpha)

    def room(self, tokens: int, image_embeds: Tensor) -> int | None:
        """Rows to set aside for a fusion pass of at most so many tokens, or None where they may be counted: on a CPU,
        which there is no waiting for."""
        return None if image_embeds.is_cpu else tokens

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


def _joined(micro_batches: tuple[Tensor | None, ...]) -> Tensor | None:
    return micro_batches[0] if len(micro_batches) == 1 or micro_batches[0] is None else torch.cat(micro_batches)


def three_pairs(negative_text: Tensor, negative_image: Tensor) -> tuple[Tensor, Tensor]:
    """Texts [3 B] and images [3 B] of (text, image), (hard text, image), (text, hard image)."""
    own = torch.arange(negative_text.shape[0], device=negative_text.device)
    texts = torch.cat([own, negative_text.clamp(min=0), own])
    images = torch.cat([own, own, negative_image.clamp(min=0)])
    return texts, images
