import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import PackedText
from albef_ds.data.masking import mask_ids, mask_tokens, pack_masked

PAD, CLS, MASK, VOCAB = 0, 2, 4, 1000
RULES = {"vocab_size": VOCAB, "mask_id": MASK, "cls_id": CLS, "pad_id": PAD}
texts = st.lists(st.lists(st.integers(5, VOCAB - 1), max_size=9).map(lambda t: [CLS, *t]), min_size=1, max_size=6)


@settings(deadline=None)
@given(texts, st.floats(0, 1), st.integers(0, 99))
def test_labels_are_the_ids_before_and_only_chosen_places_change(token_lists, probability, seed):
    text = PackedText.from_lists(token_lists)
    masked = mask_tokens(text, np.random.default_rng(seed), probability=probability, **RULES)
    assert torch.equal(masked.labels, text.input_ids[masked.positions])
    untouched = torch.ones(text.num_tokens, dtype=torch.bool)
    untouched[masked.positions] = False
    assert torch.equal(masked.input_ids[untouched], text.input_ids[untouched])
    assert CLS not in masked.labels
    assert (masked.input_ids.dtype, masked.positions.dtype, masked.labels.dtype) == (torch.int64,) * 3


@settings(deadline=None)
@given(texts, st.integers(0, 99))
def test_a_text_is_masked_the_same_alone_and_among_others(token_lists, seed):
    masked = [
        mask_ids(t, np.random.default_rng((seed, i)), probability=0.5, **RULES) for i, t in enumerate(token_lists)
    ]
    text, packed = pack_masked(masked)
    assert torch.equal(text.input_ids, PackedText.from_lists(token_lists).input_ids)
    assert torch.equal(packed.labels, text.input_ids[packed.positions])
    for i, one in enumerate(masked):
        start, end = text.cu_seqlens[i].item(), text.cu_seqlens[i + 1].item()
        inside = (packed.positions >= start) & (packed.positions < end)
        assert (packed.positions[inside] - start).tolist() == one.positions.tolist()
        assert packed.input_ids[start:end].tolist() == one.masked_ids.tolist()


def test_shares_of_mask_random_word_and_unchanged():
    ids = np.full(200_000, 7)
    masked = mask_ids(ids, np.random.default_rng(0), probability=0.15, **RULES)
    n = masked.positions.size
    assert n / ids.size == pytest.approx(0.15, abs=0.005)
    there = masked.masked_ids[masked.positions]
    assert (there == MASK).sum() / n == pytest.approx(0.8, abs=0.01)
    assert (there == 7).sum() / n == pytest.approx(0.1, abs=0.01)
    words = there[(there != MASK) & (there != 7)]
    assert words.size / n == pytest.approx(0.1, abs=0.01)
    assert words.min() < 10 and words.max() > VOCAB - 10  # the whole vocabulary, special tokens too


@pytest.mark.parametrize("probability", [0, 1])
def test_none_and_all(probability):
    masked = mask_ids([CLS, 8, 9, PAD], np.random.default_rng(0), probability=probability, **RULES)
    assert masked.positions.tolist() == ([1, 2] if probability else [])
    text, packed = pack_masked([masked])
    assert packed.positions.numel() == 2 * probability and packed.labels.dtype == torch.int64
