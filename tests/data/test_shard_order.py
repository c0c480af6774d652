from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.shard_order import ShardOrder


def epoch(order, number):
    """(pass, index) of all of one epoch's samples of this rank, step by step."""
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return [[pair for micro in _step(order, step) for pair in micro] for step in steps]


def _step(order, step):
    return list(islice(order.micro_batches(step), order.accumulation))


def test_two_epochs_on_two_ranks_have_every_sample_once_each():
    ranks = [ShardOrder.over([[5, 7, 3, 9]], buffer=6, micro_batch=3, rank=r, world_size=2, seed=3) for r in range(2)]
    orders = []
    for number in range(2):
        seen = [pair for rank in ranks for step in epoch(rank, number) for pair in step]
        assert Counter(seen) == Counter((number, i) for i in range(24))
        orders.append([i for _, i in seen])
    assert orders[0] != orders[1]
    again = ShardOrder.over([[5, 7, 3, 9]], buffer=6, micro_batch=3, rank=1, world_size=2, seed=3)
    assert epoch(again, 1) == epoch(ranks[1], 1)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_another_number_of_ranks_has_the_same_samples_in_each_step(world):
    alone = ShardOrder.over([[5, 7], [11, 2]], [1, 2.5], buffer=4, micro_batch=6, seed=1)
    ranks = [
        ShardOrder.over([[5, 7], [11, 2]], [1, 2.5], buffer=4, micro_batch=6 // world, rank=r, world_size=world, seed=1)
        for r in range(world)
    ]
    for step in range(3 * alone.steps_per_epoch):
        parts = [pair for rank in ranks for micro in _step(rank, step) for pair in micro]
        assert parts == [pair for micro in _step(alone, step) for pair in micro]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum), min_size=1, max_size=3),
    st.integers(1, 20),
    st.lists(st.sampled_from([0.3, 0.5, 1, 1.7, 3]), min_size=3, max_size=3),
    st.integers(0, 5),
)
def test_no_sample_comes_again_before_all_of_its_corpus_have_come(corpora, buffer, weights, seed):
    order = ShardOrder.over(corpora, weights[: len(corpora)], buffer, micro_batch=1, seed=seed)
    epochs = 5
    seen = [pair for number in range(epochs) for step in epoch(order, number) for pair in step]
    assert len(set(seen)) == len(seen) == epochs * order.num_samples  # an index at most once a pass
    start = 0
    for shards, taken in zip(corpora, order.taken, strict=True):
        size = sum(shards)
        mine = [(p, i - start) for p, i in seen if start <= i < start + size]
        assert len(mine) == epochs * taken
        counts = Counter(i for _, i in mine)
        assert max(counts.values()) - min(counts[i] for i in range(size)) <= 1
        start += size


def test_a_step_reads_from_the_shards_of_its_buffer_only():
    order = ShardOrder.over([[100] * 50], buffer=400, micro_batch=100)
    for step in range(order.steps_per_epoch):
        assert len(set((order.step_indices(step) // 100).ravel())) <= 4
    first = [set((order.step_indices(s) // 100).ravel()) for s in range(4)]
    assert len(set.union(*first)) == 4  # four shards, shuffled among each other
    assert np.mean([len(f) for f in first]) > 3


def test_a_small_data_set_is_shuffled_as_a_whole():
    order = ShardOrder.over([[10] * 10], micro_batch=20)
    assert len(set((order.step_indices(0) // 10).ravel())) > 6


def test_wrong_numbers_say_so():
    with pytest.raises(ValueError, match="2 weights for 1 folders"):
        ShardOrder.over([[4]], [1, 2], micro_batch=1)
    with pytest.raises(ValueError, match="above 0"):
        ShardOrder.over([[4]], [0], micro_batch=1)
    with pytest.raises(ValueError, match="shuffle_buffer is 0"):
        ShardOrder.over([[4]], buffer=0, micro_batch=1)
    with pytest.raises(ValueError, match="4 samples do not fill one global batch of 5"):
        ShardOrder.over([[4]], micro_batch=5)
