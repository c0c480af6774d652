import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import MaskedTokens, PackedText, PretrainingBatch
from albef_ds.data.masking import MaskedText, pack_masked

token_lists = st.lists(st.lists(st.integers(1, 30521), min_size=1, max_size=12), min_size=1, max_size=9)


@settings(deadline=None)
@given(token_lists)
def test_packing_keeps_every_token_in_its_place(lists):
    text = PackedText.from_lists(lists)
    ends = text.cu_seqlens.tolist()
    assert (text.num_texts, text.num_tokens, text.max_length) == (
        len(lists),
        sum(map(len, lists)),
        max(map(len, lists)),
    )
    assert text.cu_seqlens.dtype == torch.int32 and text.input_ids.dtype == text.position_ids.dtype == torch.int64
    for i, tokens in enumerate(lists):
        assert text.input_ids[ends[i] : ends[i + 1]].tolist() == tokens
        assert text.position_ids[ends[i] : ends[i + 1]].tolist() == list(range(len(tokens)))


@settings(deadline=None)
@given(token_lists, st.integers(0, 3))
def test_padding_changes_nothing(lists, extra):
    width = max(map(len, lists)) + extra
    ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in lists])
    mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in lists])
    padded, packed = PackedText.from_padded(ids, mask), PackedText.from_lists(lists)
    assert torch.equal(padded.input_ids, packed.input_ids) and torch.equal(padded.cu_seqlens, packed.cu_seqlens)


@settings(deadline=None)
@given(token_lists, st.data())
def test_texts_are_selected_in_any_order_and_number(lists, data):
    index = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=12))
    expected = PackedText.from_lists([lists[i] for i in index])
    for same in (index, torch.tensor(index)):
        found = PackedText.from_lists(lists).select(same)
        assert found.lengths == expected.lengths
        for name in ("input_ids", "position_ids", "cu_seqlens"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert getattr(found, name).dtype == getattr(expected, name).dtype


@settings(deadline=None)
@given(token_lists, st.data())
def test_masked_tokens_know_how_many_labels_each_text_has(lists, data):
    text, ends = PackedText.from_lists(lists), [0]
    chosen = [sorted(data.draw(st.sets(st.integers(1, len(t) - 1)))) if len(t) > 1 else [] for t in lists]
    for tokens in lists:
        ends.append(ends[-1] + len(tokens))
    positions = [start + p for start, places in zip(ends, chosen, strict=False) for p in places]
    masked = MaskedTokens.of(text, text.input_ids * 0, torch.tensor(positions, dtype=torch.int64))
    assert masked.counts == tuple(map(len, chosen))
    assert masked.labels.tolist() == [lists[i][p] for i, places in enumerate(chosen) for p in places]
    one_by_one = [
        MaskedText(np.array(tokens), np.array(tokens) * 0, np.array(places, dtype=np.int64))
        for tokens, places in zip(lists, chosen, strict=True)
    ]
    packed, again = pack_masked(one_by_one)
    assert torch.equal(packed.input_ids, text.input_ids)
    assert again.counts == masked.counts
    for name in ("input_ids", "positions", "labels"):
        assert torch.equal(getattr(again, name), getattr(masked, name)), name


@pytest.mark.parametrize("lists", [[], [[]], [[1], []]])
def test_a_text_without_tokens_is_refused(lists):
    with pytest.raises(ValueError, match="at least one t"):
        PackedText.from_lists(lists)


def test_a_batch_moves_with_all_its_tensors():
    text = PackedText.from_lists([[1, 2], [3]])
    masked = MaskedTokens.of(text, text.input_ids, torch.tensor([1]))
    batch = PretrainingBatch(torch.zeros(2, 3, 4, 4), text, masked, keys=("a", "b")).to("meta")
    assert {batch.images.device.type, batch.text.cu_seqlens.device.type, batch.masked.labels.device.type} == {"meta"}
    assert batch.keys == ("a", "b") and batch.text.lengths == (2, 1) and len(batch) == 2
