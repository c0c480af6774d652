"""Encodes a test set's images and texts over the ranks, and keeps what matching needs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from albef_ds.data.batch import PackedText
from albef_ds.data.captions import clean_caption
from albef_ds.data.images import decode_image
from albef_ds.evaluation.ahead import EvaluationError, loaded_ahead, refuse_holes
from albef_ds.evaluation.sharding import Batches, Ranks

MAX_WORDS = 30  # of a test caption, as in the reference's evaluation


@dataclass(frozen=True)
class EncodedTexts:
    """All texts, encoded, on every rank."""

    captions: list[str]  # [M] raw
    image_of: Tensor  # [M] int64, the image that text t describes
    packed: PackedText  # host
    embeds: Tensor  # [T, W] device
    feats: Tensor  # [M, E] device
    batches: Batches

    @classmethod
    def encode(cls, model, pairs, tokenizer, max_tokens, size, ranks, device, dtype) -> EncodedTexts:
        captions = [caption for captions in pairs.captions for caption in captions]
        image_of = torch.tensor([i for i, captions in enumerate(pairs.captions) for _ in captions])
        ids = tokenizer.encode([clean_caption(caption, MAX_WORDS) for caption in captions], max_tokens)
        lengths = torch.tensor([len(i) for i in ids])
        batches = Batches(len(ids), size, ranks)
        embeds, feats = {}, {}
        for batch in progress(batches.mine, "texts", ranks):
            rows = batches.rows(batch)
            embed, feat = model.encode_text(PackedText.from_lists(ids[rows.start : rows.stop]).to(device))
            embeds[batch], feats[batch] = embed.to(dtype), feat.float()
        feature, width = _widths(ranks, feats, embeds)

        def tokens(rows: range) -> Tensor:
            return torch.empty(int(lengths[rows.start : rows.stop].sum()), width, dtype=dtype, device=device)

        return cls(
            captions,
            image_of,
            PackedText.from_lists(ids),
            batches.share(embeds, tokens, device),
            finite(batches.share(feats, lambda rows: torch.empty(len(rows), feature, device=device), device), "texts"),
            batches,
        )

    def select(self, texts: Tensor) -> tuple[Tensor, PackedText]:
        """Embeddings and packing of some texts (indices, host), on the device."""
        index, device = texts.tolist(), self.embeds.device
        return self.embeds[self.packed.rows_of(index).to(device)].float(), self.packed.select(index).to(device)


@dataclass(frozen=True)
class EncodedImages:
    """Features of all images on every rank, embeddings of this rank's own."""

    embeds: dict[int, Tensor]  # batch -> [b, S, Wv], host
    feats: Tensor  # [N, E] device
    batches: Batches

    @classmethod
    def encode(cls, model, paths, transform, size, workers, ranks, device, dtype) -> EncodedImages:
        batches = Batches(len(paths), size, ranks)
        embeds, feats, bad = {}, {}, []
        blocks = [batches.rows(batch) for batch in batches.mine]
        loaded = loaded_ahead(lambda row: transform(decode_image(paths[row])), blocks, workers)
        for batch, (pixels, faults) in zip(
            batches.mine, progress(loaded, "images", ranks, len(batches.mine)), strict=True
        ):
            bad += faults
            if not bad:
                embed, feat = model.encode_image(torch.stack(pixels).to(device))
                embeds[batch], feats[batch] = embed.to("cpu", dtype), feat.float()
        refuse_holes(ranks, bad)
        (feature,) = _widths(ranks, feats)
        shared = batches.share(feats, lambda rows: torch.empty(len(rows), feature, device=device), device)
        return cls(embeds, finite(shared, "images"), batches)


def _widths(ranks: Ranks, *parts: dict[int, Tensor]) -> list[int]:
    """The last dimension of each, also on a rank without a batch; rank 0 always has one."""
    return ranks.all_objects([next(iter(part.values())).shape[-1] if part else 0 for part in parts])[0]


def finite(tensor: Tensor, what: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise EvaluationError(f"the model gives NaN or infinity for {what}; the weights are probably broken")
    return tensor


def progress(items, what: str, ranks: Ranks, total: int | None = None):
    """A bar on rank 0 where there is a terminal (tqdm's disable=None)."""
    return tqdm(items, desc=f"evaluating {what}", total=total, leave=False, disable=None if ranks.rank == 0 else True)
