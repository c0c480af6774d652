"""The judgement itself, on made-up times whose truth is known."""

from __future__ import annotations

import random

import pytest

from benchmarks.comparison import Interval, judge_counts, judge_time, paired_ratio, self_test

LIMIT = 0.10


def simulated(noise: float, drift: float, pairs: int = 40):
    """Times of a step on a machine that wobbles by `noise` and whose speed wanders by `drift`, the same for both."""

    def measure(slowdown: float, trial: int) -> tuple[list[float], list[float]]:
        chance = random.Random(f"{slowdown} {trial}")
        now, before = [], []
        for _ in range(pairs):
            speed = chance.lognormvariate(0, drift)
            now.append(100 * (1 + slowdown) * speed * chance.lognormvariate(0, noise))
            before.append(100 * speed * chance.lognormvariate(0, noise))
        return now, before

    return measure


@pytest.mark.parametrize("noise, drift, pairs", [(0.01, 0.0, 12), (0.05, 0.3, 40), (0.1, 0.1, 160)])
def test_it_catches_twice_the_limit_and_leaves_the_same_alone(noise, drift, pairs):
    found = self_test(simulated(noise, drift, pairs), LIMIT)
    assert found["ok"], found
    assert found["unchanged step passes"] >= 19 and found["slowdown caught"] == 20


def test_it_knows_when_it_does_not_work():
    assert not self_test(simulated(noise=3.0, drift=0.0), LIMIT)["ok"]  # too noisy a machine to see anything
    assert not self_test(lambda slowdown, trial: ([1.5] * 12, [1.0] * 12), LIMIT)["ok"]  # the same step fails


def test_both_directions_count_and_a_wide_interval_does_not():
    assert judge_time("t", Interval(1.3, 1.25, 1.35, 20), 1.0, LIMIT).kind == "worse"
    assert judge_time("t", Interval(0.8, 0.75, 0.85, 20), 1.0, LIMIT).kind == "better"
    assert judge_time("t", Interval(1.3, 1.05, 1.6, 20), 1.0, LIMIT).kind == "same"


def test_interval():
    found = paired_ratio([2.0, 4.0, 6.0] * 5, [1.0, 2.0, 3.0] * 5)
    assert (found.median, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="pairs"):
        paired_ratio([1.0] * 9, [1.0] * 9)


def test_counts_are_two_sided_and_none_is_forgotten():
    margin = {"flops": 0.01}.get
    now = {"flops": 100.5, "syncs": 1, "launches": None, "fresh": 3}
    then = {"flops": 100.0, "syncs": 2, "launches": None, "lost": 4}
    kinds = {f.name: f.kind for f in judge_counts(now, then, lambda name: margin(name, 0.0))}
    assert kinds == {"flops": "same", "syncs": "better", "fresh": "new", "lost": "gone"}
