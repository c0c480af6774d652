"""The reference's step (models/model_pretrain.py), every pass and copy of it, on our model configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from albef_ds.config import ModelConfig
from benchmarks.reference.batch import IGNORED, PaddedBatch
from benchmarks.reference.text import TextEncoder
from benchmarks.reference.vision import VisionEncoder

PARTS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")


def draw(weights: Tensor) -> int:
    """One candidate of a row; asks the device for the number, as the reference does."""
    return torch.multinomial(weights, 1).item()


class ReferenceALBEF(nn.Module):
    """Student, teacher and queues under the reference's key names: its checkpoints load with `load_state_dict`.

    Args:
        choose: a row's weights [B] to the index of its hard negative.
        modernised: attention by SDPA and every layer compiled; the caller adds bf16 autocast. The algorithm stays.
        compile_layers: whether `modernised` compiles (a test may leave it out).
    """

    def __init__(
        self,
        config: ModelConfig,
        choose: Callable[[Tensor], int] = draw,
        modernised: bool = False,
        compile_layers: bool = True,
    ):
        super().__init__()
        self.config, self.choose = config, choose
        self.visual_encoder = VisionEncoder(config.vision, modernised)
        self.text_encoder = TextEncoder(config.text, config.vision.width, modernised)
        self.vision_proj = nn.Linear(config.vision.width, config.embed_dim)
        self.text_proj = nn.Linear(config.text.width, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.itm_head = nn.Linear(config.text.width, 2)
        for part in PARTS:
            setattr(self, f"{part}_m", copy.deepcopy(getattr(self, part)).requires_grad_(False))
        for kind in ("image", "text"):
            self.register_buffer(f"{kind}_queue", F.normalize(torch.randn(config.embed_dim, config.queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        if modernised and compile_layers:
            # Layers share their graphs, one for each mode and shape: more than PyTorch allows before it gives up.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            for module in self.layers():
                module.compile(dynamic=False)  # the fastest on the one batch that a benchmark repeats

    def layers(self) -> list[nn.Module]:
        """The repeated layers of student and teacher."""
        encoders = [self.visual_encoder.blocks, self.text_encoder.bert.encoder.layer]
        encoders += [self.visual_encoder_m.blocks, self.text_encoder_m.bert.encoder.layer]
        return [layer for encoder in encoders for layer in encoder]

    def forward(self, batch: PaddedBatch, alpha: float) -> dict[str, Tensor]:
        """{"itc", "itm", "mlm"}; moves the teacher before it is used and the queues after."""
        with torch.no_grad():
            self.temp.clamp_(self.config.temperature_min, self.config.temperature_max)
        mask = batch.attention_mask
        image = self.visual_encoder(batch.images)
        image_mask = torch.ones(image.shape[:2], dtype=torch.int64, device=image.device)
        image_feat = F.normalize(self.vision_proj(image[:, 0]), dim=1)
        text = self.text_encoder.bert.read(batch.input_ids, mask)
        text_feat = F.normalize(self.text_proj(text[:, 0]), dim=1)

        with torch.no_grad():
            self.move_teacher()
            image_m = self.visual_encoder_m(batch.images)
            image_feat_m = F.normalize(self.vision_proj_m(image_m[:, 0]), dim=1)
            text_m = self.text_encoder_m.bert.read(batch.input_ids, mask)
            text_feat_m = F.normalize(self.text_proj_m(text_m[:, 0]), dim=1)
            images_all = torch.cat([image_feat_m.t(), self.image_queue.clone()], dim=1)  # [D, B + M]
            texts_all = torch.cat([text_feat_m.t(), self.text_queue.clone()], dim=1)

        loss_i2t, sim_i2t = self.contrast(image_feat, image_feat_m, texts_all, alpha)
        loss_t2i, sim_t2i = self.contrast(text_feat, text_feat_m, images_all, alpha)
        self.enqueue(image_feat_m, text_feat_m)
        itm = self.match(text, mask, image, image_mask, sim_i2t, sim_t2i)
        with torch.no_grad():
            logits_m = self.text_encoder_m.predict(batch.masked_ids, mask, image_m, image_mask)
            soft_labels = logits_m.softmax(dim=2)
        logits = self.text_encoder.predict(batch.masked_ids, mask, image, image_mask)
        mlm = masked_modelling(logits, batch.labels, soft_labels, alpha)
        return {"itc": (loss_i2t + loss_t2i) / 2, "itm": itm, "mlm": mlm}

    def contrast(self, feat: Tensor, feat_m: Tensor, bank: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """One direction of ITC, logits [B, B + M] in memory; also the logits."""
        with torch.no_grad():
            hard = torch.zeros(feat.shape[0], bank.shape[1], device=feat.device).fill_diagonal_(1)
            targets = alpha * (feat_m @ bank / self.temp).softmax(dim=1) + (1 - alpha) * hard
        logits = feat @ bank / self.temp
        return -(logits.log_softmax(dim=1) * targets).sum(dim=1).mean(), logits

    def match(self, text, mask, image, image_mask, sim_i2t, sim_t2i) -> Tensor:
        """ITM: a pass for the positive pairs, a pass of 2 B for both kinds of negatives."""
        batch = len(image)
        positive = self.text_encoder.bert.fuse(text, mask, image, image_mask)
        with torch.no_grad():
            weights_i2t = sim_i2t[:, :batch].softmax(dim=1).fill_diagonal_(0)
            weights_t2i = sim_t2i[:, :batch].softmax(dim=1).fill_diagonal_(0)
        other_image = torch.stack([image[self.choose(row)] for row in weights_t2i])
        chosen = [self.choose(row) for row in weights_i2t]
        other_text = torch.stack([text[i] for i in chosen])
        other_mask = torch.stack([mask[i] for i in chosen])
        negative = self.text_encoder.bert.fuse(
            torch.cat([text, other_text]),
            torch.cat([mask, other_mask]),
            torch.cat([other_image, image]),
            torch.cat([image_mask, image_mask]),
        )
        logits = self.itm_head(torch.cat([positive[:, 0], negative[:, 0]]))
        labels = torch.cat([torch.ones(batch, dtype=torch.int64), torch.zeros(2 * batch, dtype=torch.int64)])
        return F.cross_entropy(logits, labels.to(logits.device))

    @torch.no_grad()
    def move_teacher(self) -> None:
        """Parameter by parameter into new storage."""
        for part in PARTS:
            pairs = zip(getattr(self, part).parameters(), getattr(self, f"{part}_m").parameters(), strict=True)
            for mine, teachers in pairs:
                teachers.data = teachers.data * self.config.momentum + mine.data * (1 - self.config.momentum)

    @torch.no_grad()
    def enqueue(self, image_feat: Tensor, text_feat: Tensor) -> None:
        """Writes the features of all ranks at the pointer, which is read by the host."""
        image_feat, text_feat = gather(image_feat), gather(text_feat)
        batch, start = len(image_feat), int(self.queue_ptr)
        if self.config.queue_size % batch:
            raise ValueError(f"a queue of {self.config.queue_size} is not a multiple of the global batch {batch}")
        self.image_queue[:, start : start + batch] = image_feat.t()
        self.text_queue[:, start : start + batch] = text_feat.t()
        self.queue_ptr[0] = (start + batch) % self.config.queue_size


def masked_modelling(logits: Tensor, labels: Tensor, soft_labels: Tensor, alpha: float) -> Tensor:
    """MLM over logits [B, L, V] at every position; the mean is over the labelled ones."""
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    soft = -(logits.log_softmax(dim=2) * soft_labels).sum(dim=2)
    return (1 - alpha) * hard + alpha * soft[labels != IGNORED].mean()


def gather(features: Tensor) -> Tensor:
    """[B, D] of this rank to [world * B, D], one all-gather for each kind of feature."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return features
    parts = [torch.ones_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features)
    return torch.cat(parts)


def random_masks(batch: PaddedBatch, config: ModelConfig, probability: float, mask_id: int, cls_id: int) -> PaddedBatch:
    """The reference's own masking, on the CPU: 15 % of the tokens, of them 80 % [MASK], 10 % any word, 10 % kept."""
    ids, vocabulary = batch.input_ids.cpu(), config.text.vocab_size

    def coin(p: float) -> Tensor:
        return torch.bernoulli(torch.full(ids.shape, p)).bool()

    chosen = coin(probability) & (ids != cls_id) & (ids != config.text.pad_token_id)
    masked = chosen & coin(0.8)
    words = chosen & ~masked & coin(0.5)
    new = torch.where(words, torch.randint(vocabulary, ids.shape), ids.masked_fill(masked, mask_id))
    device = batch.images.device
    return PaddedBatch(
        batch.images,
        batch.input_ids,
        batch.attention_mask,
        new.to(device),
        ids.masked_fill(~chosen, IGNORED).to(device),
    )
