"""MixGen: images blended, texts and their masks joined, compared with a plain loop over lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import PairBatch
from albef_ds.data.mixgen import mixgen
from tests.tiny import CLS, tiny_batch


def texts_of(text, ids=None) -> list[list[int]]:
    ids, ends = (text.input_ids if ids is None else ids).tolist(), text.cu_seqlens.tolist()
    return [ids[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def labels_of(batch) -> list[list[int]]:
    """Every text as its labels, -1 where a token has none."""
    all_labels = torch.full_like(batch.text.input_ids, -1)
    all_labels[batch.masked.positions] = batch.masked.labels
    return texts_of(batch.text, all_labels)


def join(texts: list[list[int]], mixed: int) -> list[list[int]]:
    return [a + texts[i + mixed][1:] if i < mixed else a for i, a in enumerate(texts)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    share=st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5]),
    labelled=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_first_pairs_are_mixed_with_those_behind_them_and_the_others_are_as_before(lengths, share, labelled, seed):
    batch = tiny_batch(len(lengths), seed, lengths, labelled)
    before = batch.images.clone()
    new = mixgen(batch, share)
    mixed = int(share * len(lengths))

    assert texts_of(new.text) == join(texts_of(batch.text), mixed)
    assert texts_of(new.text, new.masked.input_ids) == join(texts_of(batch.text, batch.masked.input_ids), mixed)
    assert labels_of(new) == join(labels_of(batch), mixed)
    assert new.text.position_ids.tolist() == [p for text in texts_of(new.text) for p in range(len(text))]
    assert new.text.lengths == tuple(map(len, texts_of(new.text)))
    assert new.masked.counts == tuple(sum(label >= 0 for label in labels) for labels in labels_of(new))
    assert new.masked.positions.tolist() == sorted(new.masked.positions.tolist())
    assert new.text.cu_seqlens.dtype == torch.int32
    for i in range(len(lengths)):
        expected = (before[i] + before[i + mixed]) / 2 if i < mixed else before[i]
        torch.testing.assert_close(new.images[i], expected)
    assert torch.equal(batch.images, before), "the loader's own batch was changed"


def test_pairs_keep_their_ids_keys_and_number():
    batch = tiny_batch(5, lengths=[3, 1, 4, 2, 6])
    pairs = PairBatch(batch.images, batch.text, torch.tensor([7, 7, 3, 9, 1]), keys=tuple("abcde"))
    new = mixgen(pairs, 0.5)
    assert len(new) == 5
    assert new.ids.tolist() == [7, 7, 3, 9, 1]
    assert new.keys == pairs.keys
    assert texts_of(new.text) == join(texts_of(pairs.text), 2)
    assert all(text[0] == CLS and CLS not in text[1:] for text in texts_of(new.text))


def test_a_batch_too_small_for_the_share_stays_as_it_is():
    batch = tiny_batch(3)
    assert mixgen(batch, 0.25) is batch


def test_a_pair_without_a_partner_is_refused():
    with pytest.raises(ValueError, match="model.options.mixgen is 0.6"):
        mixgen(tiny_batch(4), 0.6)
