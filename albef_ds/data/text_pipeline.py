"""One sample's captions to masked tokens; every loader does it with this, so that they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albef_ds.data.captions import clean_caption
from albef_ds.data.masking import MaskedText, mask_ids
from albef_ds.data.tokenizer import CaptionTokenizer


@dataclass(frozen=True)
class TextPipeline:
    """Draws a caption, cleans it, tokenises it and masks it. A caption that cleaning empties is [CLS] alone."""

    tokenizer: CaptionTokenizer
    max_words: int = 30
    max_tokens: int = 25  # [CLS] included
    mlm_probability: float = 0.15

    def __post_init__(self):
        if not 0 <= self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability is {self.mlm_probability}: expected a share from 0 to 1")

    def __call__(self, captions: Sequence[str], rng: np.random.Generator) -> MaskedText:
        return self.batch([captions], [rng])[0]

    def batch(self, captions: Sequence[Sequence[str]], rngs: Sequence[np.random.Generator]) -> list[MaskedText]:
        """Several samples at once, each with a generator of its own: the tokenizer is quicker by the batch."""
        drawn = [texts[int(rng.integers(len(texts)))] for texts, rng in zip(captions, rngs, strict=True)]
        encoded = self.tokenizer.encode([clean_caption(text, self.max_words) for text in drawn], self.max_tokens)
        return [
            mask_ids(
                ids,
                rng,
                probability=self.mlm_probability,
                vocab_size=self.tokenizer.vocab_size,
                mask_id=self.tokenizer.mask_id,
                cls_id=self.tokenizer.cls_id,
                pad_id=self.tokenizer.pad_id,
            )
            for ids, rng in zip(encoded, rngs, strict=True)
        ]
