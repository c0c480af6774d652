"""Loss spikes: back to the last checkpoint before one, and past its batches. Off unless `faults.rollback` says so.

A step's loss (mean over the ranks) spikes where it exceeds the median of the last `window` ordinary steps by
`threshold` median absolute deviations from it. After `steps` such steps in a row all ranks go back. Steps are numbered
as if nothing had happened, so that the schedule stays what it was; the samples of the spike's steps are passed over,
and those after them come in their place:

    without       step 40 41 42 43 44      on samples of 40 41 42 43 44
    with 41 to 42 passed over, 40 41 42    on samples of 40 43 44

`rollbacks.json` in the run's folder remembers what is passed over, so a resumed run passes over it too. The losses
watched are not in a checkpoint: after a resume, watching begins again with the next `window` steps.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from albef_ds.config import FaultsConfig
from albef_ds.data.files import write_atomically

log = logging.getLogger(__name__)

ROLLBACKS = "rollbacks.json"
DELAY = 2  # steps after which a loss is known to all ranks, see Agreement

Batch = TypeVar("Batch")


class SpikeError(RuntimeError):
    """A loss spike that cannot, or may no longer, be rolled back."""


class RollBack(Exception):  # noqa: N818 (no error: the loop asks to be started again)
    """first, last: the steps of the spike, counted from 0."""

    def __init__(self, first: int, last: int):
        super().__init__(f"the loss of steps {first + 1} to {last + 1} spiked")
        self.first, self.last = first, last


class Spikes:
    """Judges one loss after the other; the same on every rank, since the losses are."""

    def __init__(self, config: FaultsConfig):
        self.config = config
        self._usual: deque[float] = deque(maxlen=config.rollback_window)
        self._spiking: list[int] = []

    def add(self, step: int, loss: float) -> None:
        """The loss of `step`, in order. A loss that is not finite was skipped, and is not judged.

        Raises RollBack once so many in a row spiked.
        """
        if loss != loss or loss in (float("inf"), float("-inf")):
            return
        if len(self._usual) == self._usual.maxlen and loss > self._limit():
            self._spiking.append(step)
            if len(self._spiking) >= self.config.rollback_steps:
                raise RollBack(self._spiking[0], step)
            return
        self._spiking.clear()
        self._usual.append(loss)

    def _limit(self) -> float:
        median = statistics.median(self._usual)
        deviation = statistics.median(abs(loss - median) for loss in self._usual)
        # Losses that do not vary at all would make anything a spike.
        return median + self.config.rollback_threshold * max(deviation, 1e-3 * abs(median))


class PassedOver:
    """Which steps' samples are passed over, as their file in the run's folder says."""

    def __init__(self, output_dir: Path):
        self.path = output_dir / ROLLBACKS
        self.rollbacks: list[dict] = []
        if self.path.exists():
            self.rollbacks = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def positions(self) -> tuple[int, ...]:
        """Steps of the undisturbed order, ascending."""
        return tuple(sorted(p for rollback in self.rollbacks for p in rollback["passed_over"]))

    def add(self, spike: RollBack, checkpoint: str, write: bool) -> None:
        """Remembers a roll-back to `checkpoint`; one rank writes it down."""
        known = self.positions
        found = [position_of(step, known) for step in range(spike.first, spike.last + 1)]
        entry = {"steps": [spike.first + 1, spike.last + 1], "back_to": checkpoint, "passed_over": found}
        self.rollbacks = [*self.rollbacks, entry]
        if write:
            write_atomically(self.path, json.dumps(self.rollbacks, indent=1))


def position_of(step: int, passed_over: Sequence[int]) -> int:
    """The step of the undisturbed order whose samples `step` has."""
    for position in sorted(passed_over):
        if position <= step:
            step += 1
    return step


def passing_over(
    batches: Callable[[int], Generator[Batch]], start_step: int, accumulation: int, passed_over: Sequence[int]
) -> Generator[Batch]:
    """The micro-batches from `start_step` on, without those of the steps passed over; these are loaded and dropped.

    Args:
        batches: a step of the undisturbed order to its micro-batches and all later ones, `accumulation` a step.
    """
    position = position_of(start_step, passed_over)
    with closing(batches(position)) as undisturbed:
        while True:
            for _ in range(accumulation):
                batch = next(undisturbed, None)
                if batch is None:
                    return
                if position not in passed_over:
                    yield batch
            position += 1
