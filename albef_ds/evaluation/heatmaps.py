"""Where in the image a text is found: Grad-CAM of the matching score or of the contrastive similarity.

ITM (paper section 4.4 and figure 4; the reference's Grounding.py and predict.py): attention of each word to the patches
in one fusion layer, times the gradient of the matching score, negative gradients left out, mean over heads. ITC: the
same for the image's [CLS] in one block of the image encoder and the similarity of the pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from albef_ds.data.batch import PackedText
from albef_ds.model.albef import ALBEF, text_spans
from albef_ds.model.packing import FusionPlan
from albef_ds.model.spans import Spans
from albef_ds.model.text import BertAttention
from albef_ds.model.vision import ImageAttention


@dataclass(frozen=True)
class Heatmaps:
    """Maps over the patch grid; values as they come, 0 or more."""

    texts: Tensor  # [B, g, g], of each whole text
    words: Tensor | None  # [T, g, g], of each of its tokens, packed; ITM only
    scores: Tensor  # [B], what the gradient is of: matching logit, or similarity / temperature


def default_layer(model: ALBEF) -> int:
    """The third fusion layer: BERT's layer 8 of 12, as in the reference. Where there are fewer, the last but one: in
    the last layer the score depends on [CLS] alone, and no other word has a map."""
    text = model.config.text
    return max(text.fusion_layer, min(text.fusion_layer + 2, text.layers - 2))


def itm_heatmaps(model: ALBEF, images: Tensor, text: PackedText, layer: int | None = None) -> Heatmaps:
    """Text i in image i.

    Args:
        layer: of BERT, a fusion layer; None: the default.

    Raises:
        ValueError: the layer looks at no image.
    """
    config = model.config.text
    layer = default_layer(model) if layer is None else layer
    if not config.fusion_layer <= layer < config.layers:
        raise ValueError(
            f"layer {layer} has no cross-attention: choose one from {config.fusion_layer} to {config.layers - 1}"
        )
    spans = text_spans(text)
    watched = model.text_encoder.bert.encoder.layer[layer].crossattention
    with torch.enable_grad(), _without_parameters(model), _watching(watched) as seen:
        image_embeds, _ = model.encode_image(images)
        hidden = model.text_encoder.encode(text.input_ids, text.position_ids, spans)
        fused = model.text_encoder.fuse(hidden, FusionPlan.aligned(spans), image_embeds, None)
        scores = model.itm_head(fused[text.cu_seqlens[:-1].long()])[:, 1]
        words = _heat(seen, scores)  # [B, L, S] padded
    words = _grid(spans.unpad(words)[:, 1:])
    texts = torch.zeros_like(words[: spans.num]).index_add_(0, spans.run_of_row, words)
    return Heatmaps(texts / spans.lengths[:, None, None], words, scores.detach())


def itc_heatmaps(model: ALBEF, images: Tensor, text: PackedText, block: int | None = None) -> Heatmaps:
    """Text i in image i.

    Args:
        block: of the image encoder; None: two thirds of the way, the reference's 8 of 12.
    """
    blocks = model.visual_encoder.blocks
    block = 2 * len(blocks) // 3 if block is None else block
    if not 0 <= block < len(blocks):
        raise ValueError(f"block {block}: the image encoder has blocks 0 to {len(blocks) - 1}")
    with torch.enable_grad(), _without_parameters(model), _watching(blocks[block].attn) as seen:
        _, image_feat = model.encode_image(images)
        _, text_feat = model.encode_text(text)
        scores = (image_feat * text_feat).sum(-1) / model.temp.detach()
        heat = _heat(seen, scores)  # [B, S, S]
    return Heatmaps(_grid(heat[:, 0, 1:]), None, scores.detach())


@dataclass
class _Seen:
    probabilities: list[Tensor] = field(default_factory=list)  # [N, H, Lq, Lk] of the watched attention


def _heat(seen: _Seen, scores: Tensor) -> Tensor:
    (attention,) = seen.probabilities
    (gradient,) = torch.autograd.grad(scores.sum(), attention)
    return (attention * gradient.clamp(min=0)).mean(1).detach()


def _grid(patches: Tensor) -> Tensor:
    """[N, g * g] to [N, g, g]."""
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side))


@contextmanager
def _watching(module: BertAttention | ImageAttention) -> Iterator[_Seen]:
    """Computes one attention plainly while it lasts, so that its probabilities can be seen; training never does."""
    seen = _Seen()

    def probabilities(q: Tensor, k: Tensor, v: Tensor, spans: Spans, key_spans: Spans) -> Tensor:
        q, k, v = (s.pad(x).transpose(1, 2) for s, x in ((spans, q), (key_spans, k), (key_spans, v)))
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~key_spans.mask[:, None, None, :], torch.finfo(scores.dtype).min)
        # A leaf: what comes before has no part in the gradient with respect to the probabilities themselves.
        weights = scores.softmax(-1).detach().requires_grad_()
        seen.probabilities.append(weights)
        return spans.unpad((weights.to(v.dtype) @ v).transpose(1, 2))

    def text(x: Tensor, spans: Spans, keys: Tensor, values: Tensor, key_spans: Spans) -> Tensor:
        q, k, v = (t.unflatten(-1, (module.heads, -1)) for t in (module.self.query(x), keys, values))
        return module.output(probabilities(q, k, v, spans, key_spans).flatten(1), x)

    def image(x: Tensor, **_) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = module.qkv(x).view(batch * length, 3, module.num_heads, module.head_dim).unbind(1)
        spans = Spans.equal(batch, length, x.device)
        return module.proj(probabilities(q, k, v, spans, spans).reshape(batch, length, -1))

    module.forward = text if isinstance(module, BertAttention) else image
    try:
        yield seen
    finally:
        del module.forward  # the class's own again


@contextmanager
def _without_parameters(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and no gradient reaches a parameter: only the watched attention wants one."""
    training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        model.train(training)
