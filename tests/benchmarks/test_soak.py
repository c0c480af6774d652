"""What the soak takes for growth, and what for noise."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.soak import POLL, as_text, judge, least, series_of

MINUTES_30 = [10.0 * i for i in range(180)]


def noisy(seconds: float, rise_an_hour: float, seed: int = 0) -> float:
    return 2800 + rise_an_hour * seconds / 3600 + random.Random(f"{seed} {seconds}").gauss(0, 40)


@pytest.mark.parametrize("seed", range(5))
def test_noise_passes_and_a_slow_leak_below_it_does_not(seed):
    flat = judge("rss_mib", [(t, noisy(t, 0, seed)) for t in MINUTES_30], 360)
    leaking = judge("rss_mib", [(t, noisy(t, 400, seed)) for t in MINUTES_30], 360)
    assert flat["passed"] and abs(flat["rise"]) < flat["limit"]
    assert not leaking["passed"] and leaking["rise"] > leaking["limit"]


def test_what_grows_while_warming_up_does_not_count():
    assert judge("rss_mib", [(t, min(t, 300) + 2000) for t in MINUTES_30], 360)["passed"]


def test_three_more_files_are_too_many():
    assert judge("files", [(t, 50 + (t > 1000)) for t in MINUTES_30], 360)["passed"]
    assert not judge("files", [(t, 50 + t // 600 * 2) for t in MINUTES_30], 360)["passed"]


def test_a_run_too_short_is_no_proof():
    assert not judge("rss_mib", [(t, 2000) for t in MINUTES_30[:20]], 360)["passed"]


def test_a_rank_that_has_ended_leaves_the_others_series():
    ranks = [{"rss_mib": 1.0}, {"rss_mib": 2.0}]
    samples = [{"seconds": 0, "disk_mib": 5, "ranks": ranks}, {"seconds": 10, "disk_mib": 6, "ranks": []}]
    assert series_of(samples) == {
        "disk_mib": [(0, 5), (10, 6)],
        "rank_0.rss_mib": [(0, 1.0)],
        "rank_1.rss_mib": [(0, 2.0)],
    }


def test_the_least_of_a_while_is_taken_of_each_rank(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("benchmarks.soak.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("benchmarks.soak.time.sleep", lambda seconds: clock.append(clock.pop() + seconds))
    values = iter([[5, 9], [3, 8], [4, 2], [6, 6], [1, 1]])
    assert least(lambda: next(values), 2.5 * POLL) == [3, 2]  # four looks, the fifth would be too late


def test_the_file_is_json_with_a_line_a_look():
    samples = [{"seconds": 10.0 * i, "disk_mib": 1.5, "ranks": [{"rss_mib": 2.0}]} for i in range(4)]
    result = {"minutes": 30, "passed": True, "samples": samples, "judged": {"disk_mib": {"passed": True}}}
    text = as_text(result)
    assert json.loads(text) == result
    assert sum('"seconds"' in line for line in text.splitlines()) == 4
