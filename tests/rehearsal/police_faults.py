"""Faults that only a GPU shows, planted one at a time: the police has to catch each in what runs over it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch

from albef_ds.data.batch import Movable, PackedText
from albef_ds.inference.model import Albef
from albef_ds.model.packing import FusionPlan
from albef_ds.model.spans import Spans


@dataclass(frozen=True)
class Fault:
    name: str
    case: str  # that runs over it
    refused: str  # what it is refused with, a pattern
    plant: Callable[[], AbstractContextManager]


def _in_place_of(owner: type, name: str, planted: object) -> Callable[[], AbstractContextManager]:
    return lambda: mock.patch.object(owner, name, planted)


def _left(field: str) -> Callable[[], AbstractContextManager]:
    def to(self: PackedText, device, non_blocking: bool = True) -> PackedText:
        return replace(Movable.to(self, device, non_blocking), **{field: getattr(self, field)})

    return _in_place_of(PackedText, "to", to)


def _equal_spans(cls, num: int, length: int, device) -> Spans:
    return cls(torch.arange(0, (num + 1) * length, length, dtype=torch.int32), length, num * length, regular=True)


def _gather(self: FusionPlan, text_embeds):
    return text_embeds if self.source is None else text_embeds.index_select(0, self.source.cpu())


def _batched(self: Albef, count: int, batch_size: int, run: Callable):
    with self._computing():
        return torch.from_numpy(np.concatenate([run(slice(0, count)).float().numpy()]))


def _pixels(self: Albef, images):
    return torch.from_numpy(np.stack([self._transform(image).numpy() for image in images]))


TWO = r"at least two devices, cuda:0 and cpu! \({}: "
OPERATOR, INT32 = r"\w+::\w+", r"int32 \[\d+\].* on cpu beside"  # whichever reads it first
FAULTS = (
    Fault("a field of the batch on the host", "evaluate entailment", TWO.format(OPERATOR) + INT32, _left("cu_seqlens")),
    Fault("words on the host", "evaluate retrieval", TWO.format("aten::embedding"), _left("input_ids")),
    Fault("places on the host", "evaluate grounding", TWO.format("aten::embedding"), _left("position_ids")),
    Fault(
        "a buffer without device=",
        "evaluate vqa",
        TWO.format(OPERATOR) + INT32,
        _in_place_of(Spans, "equal", classmethod(_equal_spans)),
    ),
    Fault(
        "an index on the host into index_select",
        "match",
        TWO.format("aten::index_select"),
        _in_place_of(FusionPlan, "gather", _gather),
    ),
    Fault(
        ".numpy() of the GPU's tensor",
        "image features",
        "TypeError: can't convert cuda:0 device type tensor to numpy",
        _in_place_of(Albef, "_batched", _batched),
    ),
    Fault(
        "pixels from numpy, not moved",
        "heat maps by itc",
        TWO.format("aten::convolution"),
        _in_place_of(Albef, "_pixels", _pixels),
    ),
)
