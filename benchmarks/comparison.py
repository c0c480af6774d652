"""When is a measurement worse than its baseline? Counts by margins, times by paired ratios with a confidence interval.

Both are two-sided: an unexplained gain is a finding too, and is recorded as the new baseline or explained.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

DRAWS = 1000
LEAST_PAIRS = 10


@dataclass(frozen=True)
class Interval:
    """A ratio of times: the median of the pairs and its bootstrap interval."""

    median: float
    low: float
    high: float
    pairs: int


def paired_ratio(times: list[float], rivals: list[float], level: float = 0.95, seed: int = 0) -> Interval:
    """times / rivals, pair by pair, on the logarithm: twice as slow and twice as fast weigh alike.

    Raises:
        ValueError: fewer than LEAST_PAIRS pairs, on which an interval says nothing.
    """
    logs = [math.log(a / b) for a, b in zip(times, rivals, strict=True)]
    if len(logs) < LEAST_PAIRS:
        raise ValueError(f"an interval needs at least {LEAST_PAIRS} pairs, got {len(logs)}")
    chance = random.Random(seed)
    medians = sorted(statistics.median(chance.choices(logs, k=len(logs))) for _ in range(DRAWS))
    tail = (1 - level) / 2
    low, high = medians[int(tail * DRAWS)], medians[int((1 - tail) * DRAWS) - 1]
    return Interval(math.exp(statistics.median(logs)), math.exp(low), math.exp(high), len(logs))


@dataclass(frozen=True)
class Finding:
    """One number against its baseline. `kind`: same, worse, better, or new (not in the baseline)."""

    name: str
    now: float | None
    baseline: float | None
    margin: float
    kind: str

    @property
    def fails(self) -> bool:
        return self.kind != "same"


def judge_time(name: str, now: Interval, baseline: float, limit: float) -> Finding:
    """Worse or better only where the whole interval lies beyond the limit."""
    kind = "same"
    if now.low > baseline * (1 + limit):
        kind = "worse"
    elif now.high < baseline / (1 + limit):
        kind = "better"
    return Finding(name, now.median, baseline, limit, kind)


def judge_counts(now: dict[str, float | None], baseline: dict[str, float | None], margin_of: Callable) -> list[Finding]:
    """Every count of either side; what only one of them has is a finding, what both lack is none."""
    found = []
    for name in sorted({*now, *baseline}):
        here, there, margin = now.get(name), baseline.get(name), margin_of(name)
        if here is None and there is None:
            continue
        if here is None or there is None:
            found.append(Finding(name, here, there, margin, "new" if there is None else "gone"))
            continue
        allowed = margin * abs(there)
        kind = "same" if abs(here - there) <= allowed else "worse" if here > there else "better"
        found.append(Finding(name, here, there, margin, kind))
    return found


def self_test(measure: Callable[[float, int], tuple[list[float], list[float]]], limit: float, trials: int = 20) -> dict:
    """Does the check see what it must and nothing else?

    Args:
        measure: (slowdown, trial) to the times of a step made slower by that share, and of the same step as it is.
        limit: of `judge_time`; the slowdown put in is twice as large.
    """

    def kinds(slowdown: float) -> list[str]:
        intervals = (paired_ratio(*measure(slowdown, trial)) for trial in range(trials))
        return [judge_time("self-test", interval, 1.0, limit).kind for interval in intervals]

    passed, caught = kinds(0.0).count("same"), kinds(2 * limit).count("worse")
    needed = math.ceil(0.95 * trials)
    return {
        "limit": limit,
        "trials": trials,
        "unchanged step passes": passed,
        "slowdown caught": caught,
        "ok": passed >= needed and caught == trials,
    }
