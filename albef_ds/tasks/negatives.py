"""Hard negatives from the micro-batches of all ranks (`model.options.negatives: all`), as BLIP's negative_all_rank.

Embeddings are gathered with their gradient: what another rank learns from a text or an image of ours comes back to us.
With gradients averaged over the ranks, as DeepSpeed does, the matching loss is that of one process with all samples.

What it costs a micro-batch: every rank holds the image and text embeddings of all ranks, and their gradients; the
similarities [world * B, world * B]; and twice the cross-attention keys and values (own images and negative ones). No
host waits for its device: how long the texts of other ranks are, the hosts tell each other while the encoders compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from albef_ds.data.batch import PackedText
from albef_ds.model.queue import gather_features
from albef_ds.model.spans import Spans


@dataclass(frozen=True)
class Pool:
    """The texts and images that pairs are made of; a rank's own B come first, in their order."""

    text_embeds: Tensor  # [T, W]
    spans: Spans  # of the texts
    image_embeds: Tensor  # [I, S, Wv]


@dataclass(frozen=True)
class AllRanks:
    """What this rank knows of every rank's micro-batch. All ranks have the same number of samples B."""

    rank: int
    own_tokens: int  # T
    lengths: Tensor  # [world, B] int64, of the texts
    ids: Tensor | None  # [world * B] int64
    sizes: Tensor  # [2] int64, host: the tokens of the rank that has most, and of the longest text
    agreed: dist.Work  # until it is done, `sizes` are this rank's own

    @classmethod
    def meet(cls, text: PackedText, ids: Tensor | None = None) -> AllRanks:
        """Collective: one small all-gather on the devices, and one between the hosts that has long arrived when it is
        needed, if this is called before the encoders."""
        sizes = torch.tensor([text.num_tokens, text.max_length])
        agreed = dist.all_reduce(sizes, dist.ReduceOp.MAX, group=hosts(dist.group.WORLD), async_op=True)
        lengths = text.cu_seqlens.long().diff()
        message = torch.stack([lengths] if ids is None else [lengths, ids])  # [1 or 2, B]
        gathered = gather(message)  # [world, 1 or 2, B]
        all_ids = None if ids is None else gathered[:, 1].flatten()
        return cls(dist.get_rank(), text.num_tokens, gathered[:, 0], all_ids, sizes, agreed)

    @cached_property
    def largest(self) -> tuple[int, int]:
        """`sizes`, once all hosts have said theirs."""
        self.agreed.wait()
        most_tokens, longest = self.sizes.tolist()
        return most_tokens, longest

    @property
    def batch(self) -> int:
        return self.lengths.shape[1]

    def negatives(
        self,
        pool: Pool,
        features: tuple[Tensor, Tensor, Tensor, Tensor],
        temperature: Tensor,
        sample: Callable[..., Tensor],
    ) -> tuple[Pool, Tensor, Tensor]:
        """Draws a hard text for each image, and a hard image for each text, among those of all ranks.

        Args:
            pool: this rank's own; the texts that are candidates (not the masked ones) come first.
            features: [B, D] of the student's images and texts, and of the teacher's.
            sample: as of `Contrastive`.

        Returns:
            The pool with the negatives in it, and [B] each: which of its texts, and of its images, is the negative; -1
            where a sample has none.
        """
        image_feat, text_feat, image_feat_m, text_feat_m = features
        all_images_m, all_texts_m, _ = gather_features(image_feat_m, text_feat_m)
        hard_text = self.draw(similarities(image_feat, all_texts_m, temperature), sample)
        hard_image = self.draw(similarities(text_feat, all_images_m, temperature), sample)

        texts = self.gather_texts(pool.text_embeds[: self.own_tokens])
        images = gather(pool.image_embeds).flatten(0, 1).index_select(0, hard_image.clamp(min=0))
        wider = Pool(
            torch.cat([pool.text_embeds, texts]),
            self.behind(pool.spans),
            torch.cat([pool.image_embeds, images]),
        )
        # The texts of each rank have one more behind them, see `behind`.
        text_index = pool.spans.num + hard_text + hard_text.div(self.batch, rounding_mode="floor")
        image_index = torch.arange(self.batch, 2 * self.batch, device=hard_image.device)
        return wider, text_index.where(hard_text >= 0, -1), image_index.where(hard_image >= 0, -1)

    def draw(self, logits: Tensor, sample: Callable[..., Tensor]) -> Tensor:
        """[B, world * B] logits to [B] candidates. The sampler takes a square, of which this rank fills its rows."""
        mine = slice(self.rank * self.batch, (self.rank + 1) * self.batch)
        square = logits.new_zeros(logits.shape[1], logits.shape[1])
        square[mine] = logits
        return (sample(square) if self.ids is None else sample(square, self.ids))[mine]

    def gather_texts(self, text_embeds: Tensor) -> Tensor:
        """[T, W] of this rank to [world * most_tokens, W]; behind a rank's tokens stand zeros that nobody reads."""
        most_tokens, _ = self.largest
        return gather(F.pad(text_embeds, (0, 0, 0, most_tokens - self.own_tokens))).flatten(0, 1)

    def behind(self, own: Spans) -> Spans:
        """The runs of the own texts and then of the gathered ones: of each rank B texts, and what was padded."""
        most_tokens, longest = self.largest
        padded = most_tokens - self.lengths.sum(1, keepdim=True)
        ends = torch.cat([self.lengths, padded], dim=1).flatten().cumsum(0) + own.num_rows
        rows = own.num_rows + self.lengths.shape[0] * most_tokens
        # No pair has the padding as its text: the longest run that matters is a text.
        return Spans(torch.cat([own.cu_seqlens, ends.int()]), max(own.max_length, longest), rows)


def across_ranks(negatives: str) -> bool:
    """Whether negatives come from elsewhere: of a single process all samples are its own."""
    return negatives == "all" and dist.is_initialized() and dist.get_world_size() > 1


@lru_cache(maxsize=1)
def hosts(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of all ranks, for what no device need know. Collective where one has to be made, the first time."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")


@torch.no_grad()
def similarities(feat: Tensor, all_feat_m: Tensor, temperature: Tensor) -> Tensor:
    """[B, D] and [N, D] to [B, N] logits in fp32, as the contrastive loss has them."""
    with torch.autocast(feat.device.type, enabled=False):
        return feat @ all_feat_m.T / temperature


def gather(mine: Tensor) -> Tensor:
    """[...] of this rank, the same shape on all, to [world, ...]; the gradient sums over ranks."""
    return _Gather.apply(mine)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mine: Tensor) -> Tensor:
        everyones = mine.new_empty(dist.get_world_size(), *mine.shape)
        dist.all_gather_into_tensor(everyones.flatten(0, 1), mine.contiguous())
        return everyones

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        mine = gradient.new_empty(gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous().flatten(0, 1))
        return mine
