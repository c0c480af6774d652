"""Images of a folder, found by a text or by another image: their features are computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from albef_ds.data.images import ImageError
from albef_ds.inference.inputs import Picture, Readable, listed
from albef_ds.inference.model import Albef


@dataclass(frozen=True)
class Found:
    image: Path
    similarity: float  # cosine


@dataclass(frozen=True)
class ImageIndex:
    images: tuple[Path, ...]  # [N]
    features: Tensor  # [N, E]
    faults: tuple[ImageError, ...]  # images that cannot be read, left out

    @classmethod
    def build(cls, model: Albef, images: Picture | Sequence[Picture], batch_size: int = 64) -> ImageIndex:
        """images: files, or a folder of them. Raises ImageError where the folder has none, or none can be read."""
        source = Readable(listed(images), batch_size)
        paths, features = [], []
        for given, pictures in source:
            paths += [Path(p) for p in given]
            features.append(model.image_features(pictures, batch_size))
        if not features:
            raise ImageError(str(images), f"not one image can be read, e.g. {source.faults[0]}")
        return cls(tuple(paths), torch.cat(features), tuple(source.faults))

    def by_text(self, model: Albef, text: str, top: int) -> list[Found]:
        return self._nearest(model.text_features(text), top)

    def by_image(self, model: Albef, image: Picture, top: int) -> list[Found]:
        return self._nearest(model.image_features([image]), top)

    def _nearest(self, query: Tensor, top: int) -> list[Found]:
        best = (self.features @ query[0]).topk(min(max(top, 1), len(self.images)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Found(self.images[i], similarity) for i, similarity in found]
