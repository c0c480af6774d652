from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.data.order import SampleOrder, sample_rng


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 50), st.integers(0, 9))
def test_a_step_has_the_same_samples_whoever_shares_it(micro, accumulation, ranks, extra, step):
    batch = micro * accumulation * ranks
    alone = SampleOrder(batch + extra, batch, seed=3)
    parts = [SampleOrder(batch + extra, micro, accumulation, r, ranks, seed=3).step_indices(step) for r in range(ranks)]
    assert all(part.shape == (accumulation, micro) for part in parts)
    assert np.concatenate(parts).ravel().tolist() == alone.step_indices(step).ravel().tolist()


def test_an_epoch_has_no_sample_twice_and_the_next_another_order():
    order = SampleOrder(103, 10)
    assert order.steps_per_epoch == 10
    epochs = [np.concatenate([order.step_indices(e * 10 + s) for s in range(10)]).ravel() for e in range(2)]
    assert all(len(set(epoch.tolist())) == 100 for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert [order.epoch_of(s) for s in (0, 9, 10, 25)] == [0, 0, 1, 2]


def test_micro_batches_go_on_through_epochs_from_any_step():
    order = SampleOrder(20, 4, accumulation=2)
    whole = list(islice(order.micro_batches(0), 14))
    assert list(islice(order.micro_batches(3), 8)) == whole[6:]
    assert [batch[0][0] for batch in whole] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2
    with pytest.raises(ValueError, match="start_step is -1"):
        next(order.micro_batches(-1))


def test_too_few_samples_say_the_numbers():
    with pytest.raises(
        ValueError, match=r"7 samples do not fill one global batch of 8 \(micro_batch 2 x accumulation 2"
    ):
        SampleOrder(7, 2, 2, 1, 2)


@pytest.mark.parametrize("wrong", [{"micro_batch": 0}, {"rank": 2}, {"rank": -1}, {"seed": -1}, {"accumulation": 0}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SampleOrder(**{"num_samples": 100, "micro_batch": 2, "world_size": 2, **wrong})


def test_generators_differ_by_every_part():
    draws = {sample_rng(*part).random() for part in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(draws) == 4 and sample_rng(0, 1, 2).random() == sample_rng(0, 1, 2).random()
