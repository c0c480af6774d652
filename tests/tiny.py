"""A model small enough for a test, and batches for it with ragged texts."""

from __future__ import annotations

import torch

from albef_ds.config import ModelConfig, TextConfig, VisionConfig
from albef_ds.data.batch import MaskedTokens, PackedText, PretrainingBatch
from albef_ds.model.albef import ALBEF
from albef_ds.model.packing import FusionPlan
from albef_ds.model.spans import Spans

VOCABULARY, MASK, CLS = 61, 4, 2


def tiny_model(dropout: float = 0.0, **changes) -> ModelConfig:
    vision = VisionConfig(image_size=32, patch_size=8, width=24, layers=2, heads=2)
    text = TextConfig(
        vocab_size=VOCABULARY,
        width=24,
        layers=3,
        fusion_layer=1,
        heads=3,
        mlp_width=40,
        max_positions=16,
        dropout=dropout,
        attention_dropout=dropout,
    )
    return ModelConfig(**{"vision": vision, "text": text, "embed_dim": 12, "queue_size": 37} | changes)


def tiny_batch(size: int, seed: int = 0, lengths: list[int] | None = None, labelled: float = 0.3) -> PretrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or torch.randint(1, 11, (size,), generator=generator).tolist()
    texts = [[CLS] + torch.randint(5, VOCABULARY, (n - 1,), generator=generator).tolist() for n in lengths]
    text = PackedText.from_lists(texts)
    chosen = (torch.rand(text.num_tokens, generator=generator) < labelled) & (text.position_ids > 0)
    positions = chosen.nonzero().flatten()
    masked = text.input_ids.masked_fill(chosen, MASK)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return PretrainingBatch(images, text, MaskedTokens.of(text, masked, positions))


def one_by_one(model: ALBEF, text_embeds, text, pairs, image_embeds):
    """Every pair in a fusion pass of its own, without any packing."""
    logits = []
    starts = text.cu_seqlens.tolist()
    for t, i in pairs:
        hidden = text_embeds[starts[t] : starts[t + 1]]
        spans = Spans.equal(1, hidden.shape[0], "cpu")
        out = model.text_encoder.fuse(hidden, FusionPlan.aligned(spans), image_embeds[i : i + 1], torch.tensor([0]))
        logits.append(model.itm_head(out))
    return torch.cat(logits)
