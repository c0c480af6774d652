import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.batch import MaskedTokens, PackedText, PretrainingBatch

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


@pytest.mark.parametrize("lists", [[], [[]], [[1], []]])
def test_a_text_without_tokens_is_refused(lists):
    with pytest.raises(ValueError, match="at least one t"):
        PackedText.from_lists(lists)


def test_a_batch_moves_with_all_its_tensors():
    text = PackedText.from_lists([[1, 2], [3]])
    masked = MaskedTokens(text.input_ids, torch.tensor([1]), torch.tensor([2]))
    batch = PretrainingBatch(torch.zeros(2, 3, 4, 4), text, masked, keys=("a", "b")).to("meta")
    assert {batch.images.device.type, batch.text.cu_seqlens.device.type, batch.masked.labels.device.type} == {"meta"}
    assert batch.keys == ("a", "b") and batch.text.max_length == 2 and len(batch) == 2
