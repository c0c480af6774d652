"""Lays out (text, image) pairs for one packed fusion pass: texts end to end, sorted by the image they attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from albef_ds.model.spans import Spans


@dataclass(frozen=True)
class Rows:
    """The rows of a packed batch whose result is wanted: a last layer computes no others (all stay keys and values)."""

    index: Tensor  # [R] int64, ascending
    spans: Spans  # their runs by text, as queries
    groups: Spans  # their runs by image
    place: Tensor  # [R] int64: where the j-th row that was asked for stands in the result


@dataclass(frozen=True)
class FusionPlan:
    """Where every token of N pairs comes from and where it stands."""

    source: Tensor | None  # [T'] int64, row of the text embeddings that token t is read from; None: all, in order
    spans: Spans  # the texts, for self-attention
    groups: Spans  # run i: all texts that attend to image i, for cross-attention
    first: Tensor  # [N] int64, row of pair j's first token ([CLS])

    def gather(self, text_embeds: Tensor) -> Tensor:
        return text_embeds if self.source is None else text_embeds.index_select(0, self.source)

    def select(self, rows: Tensor) -> Rows:
        """The wanted rows [R], all different, in any order."""
        index, order = rows.sort()
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return Rows(index, _runs_of(index, self.spans), _runs_of(index, self.groups), place)

    @classmethod
    def aligned(cls, text: Spans) -> FusionPlan:
        """Text i with image i: the tokens stay where they are."""
        return cls(None, text, text, text.cu_seqlens[:-1].long())

    @classmethod
    def grouped(cls, text: Spans, num_images: int) -> FusionPlan:
        """As many texts to each image, those of image 0 first: the tokens stay where they are.

        Raises:
            ValueError: the texts do not divide over the images.
        """
        each, rest = divmod(text.num, num_images)
        if rest:
            raise ValueError(f"{text.num} texts do not divide over {num_images} images")
        if each == 1:
            return cls.aligned(text)
        groups = Spans(text.cu_seqlens[::each].contiguous(), each * text.max_length, text.num_rows)
        return cls(None, text, groups, text.cu_seqlens[:-1].long())

    @classmethod
    def build(cls, text: Spans, text_index: Tensor, image_index: Tensor, num_images: int, capacity: int | None = None):
        """Pair j is text text_index[j] with image image_index[j].

        Args:
            text: spans of the texts that the pairs are made of.
            text_index, image_index: [N] int64, on the device.
            capacity: None: count the tokens, which waits for the device. Otherwise an upper bound on them, known to the
                host: the rows beyond the real ones become filler texts (whose results nobody reads), and nothing waits.
        """
        device = text_index.device
        order = torch.argsort(image_index, stable=True)
        texts, images = text_index[order], image_index[order]
        cu_seqlens = torch.nn.functional.pad(text.lengths[texts].cumsum(0), (1, 0))
        boundaries = torch.searchsorted(images, torch.arange(num_images + 1, device=device))
        cu_groups = cu_seqlens[boundaries]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
        first = cu_seqlens[place]

        if capacity is None:
            num_rows = int(cu_seqlens[-1])
            longest_group = int(cu_groups.diff().max())
        else:
            num_rows = longest_group = capacity
            # Fillers no longer than a text, so that no kernel has to be launched for a longer one.
            count = -(-capacity // text.max_length)
            steps = torch.arange(1, count + 1, device=device) * text.max_length
            cu_seqlens = torch.cat([cu_seqlens, (cu_seqlens[-1] + steps).clamp(max=capacity)])
            texts = torch.nn.functional.pad(texts, (0, count))
            # The last image gets the fillers' queries. Filled on the device; a single element would be copied there.
            cu_groups[-1:] = capacity

        spans = Spans(cu_seqlens.int(), text.max_length, num_rows)
        start = text.cu_seqlens.long()[texts]
        source = (start[spans.run_of_row] + spans.offset_in_run).clamp(max=text.num_rows - 1)
        return cls(source, spans, Spans(cu_groups.int(), longest_group, num_rows), first)


def _runs_of(index: Tensor, spans: Spans) -> Spans:
    """How rows `index` [R], ascending, divide over the runs of `spans`."""
    cu_seqlens = torch.searchsorted(index, spans.cu_seqlens.long()).int()
    bound = min(spans.max_length, index.numel())
    if index.device.type == "cpu":  # asking a GPU would wait for it
        bound = int(cu_seqlens.diff().max())
    return Spans(cu_seqlens, max(1, bound), index.numel())
