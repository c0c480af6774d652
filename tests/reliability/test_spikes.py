"""What counts as a loss spike, and which samples come instead of those passed over."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albef_ds.config import FaultsConfig
from albef_ds.training.spikes import PassedOver, RollBack, Spikes, passing_over, position_of

CONFIG = FaultsConfig(rollback=True, rollback_window=8, rollback_threshold=10.0, rollback_steps=3)


def feed(losses) -> RollBack | None:
    spikes = Spikes(CONFIG)
    for step, loss in enumerate(losses):
        try:
            spikes.add(step, loss)
        except RollBack as found:
            return found
    return None


USUAL = [5.0, 5.2, 4.9, 5.1, 5.0, 4.8, 5.1, 5.0]


def test_three_losses_in_a_row_far_above_the_usual_are_a_spike():
    found = feed([*USUAL, 50.0, 60.0, 55.0, 5.0])
    assert (found.first, found.last) == (8, 10)


@pytest.mark.parametrize(
    "losses",
    [
        [*USUAL, 50.0, 60.0, 5.0, 50.0, 60.0],  # never three in a row
        [*USUAL, *[5.5] * 10],  # within ten deviations
        [*USUAL, *[0.1] * 10],  # falling is no spike
        [*USUAL[:7], 50.0, 60.0, 55.0],  # what is usual is not known yet
        [*USUAL, float("nan"), float("inf"), 5.0],  # skipped steps
        [3.0] * 8 + [3.001] * 5,  # no variation at all
    ],
)
def test_no_spike(losses):
    assert feed(losses) is None


def test_a_skipped_step_amid_a_spike_does_not_end_it():
    found = feed([*USUAL, 50.0, float("nan"), 60.0, 55.0])
    assert (found.first, found.last) == (8, 11)


@given(st.sets(st.integers(0, 30), max_size=12), st.integers(0, 20), st.integers(1, 3))
def test_from_any_step_on_the_samples_are_those_of_one_go_without_those_passed_over(passed_over, start, accumulation):
    def batches(step):
        return ((s, micro) for s in range(step, 200) for micro in range(accumulation))

    order = [s for s in range(200) if s not in passed_over]
    positions = sorted(passed_over)
    found = list(islice(passing_over(batches, start, accumulation, positions), 5 * accumulation))
    assert found == [(s, micro) for s in order[start : start + 5] for micro in range(accumulation)]
    assert position_of(start, positions) == order[start]


def test_a_second_roll_back_counts_from_the_undisturbed_order_and_both_are_remembered(tmp_path):
    first = PassedOver(tmp_path)
    first.add(RollBack(4, 5), "step_00000004", write=True)
    assert first.positions == (4, 5)
    again = PassedOver(tmp_path)
    again.add(RollBack(4, 6), "step_00000004", write=True)
    assert PassedOver(tmp_path).positions == (4, 5, 6, 7, 8)
