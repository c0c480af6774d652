"""Which samples are in which step: a function of seed and step number alone, so that position is the step number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# First words of every seed: streams for different purposes must not coincide (numpy pads short seeds with zeros).
_PERMUTATION, _SAMPLE = 1, 2


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """All the randomness of one sample in one epoch, whichever rank or worker prepares it."""
    return np.random.default_rng((_SAMPLE, seed, epoch, index))


@dataclass(frozen=True)
class SampleOrder:
    """Endless shuffled order over `num_samples`; every epoch drops what does not fill a global batch.

    Step s of an epoch has the s-th slice of the epoch's permutation. Each rank takes a contiguous part of the slice and
    cuts it into `accumulation` micro-batches; another number of ranks with the same global batch therefore sees the
    same samples in each step.
    Raises ValueError where a number is out of range or the data do not fill one global batch.
    """

    num_samples: int
    micro_batch: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    _cache: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("micro_batch", "accumulation", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}: expected 0 to {self.world_size - 1} (world_size - 1)")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: expected 0 or more")
        if self.num_samples < self.global_batch:
            raise ValueError(
                f"{self.num_samples} samples do not fill one global batch of {self.global_batch} "
                f"(micro_batch {self.micro_batch} x accumulation {self.accumulation} x world_size {self.world_size}); "
                "lower micro_batch or accumulation, start fewer ranks, or give more data"
            )

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    def epoch_of(self, step: int) -> int:
        """The epoch of optimiser step `step`, both counted from 0."""
        return step // self.steps_per_epoch

    def step_indices(self, step: int) -> np.ndarray:
        """[accumulation, micro_batch] int64: this rank's samples of optimiser step `step`."""
        epoch, at = divmod(step, self.steps_per_epoch)
        per_rank = self.micro_batch * self.accumulation
        start = at * self.global_batch + self.rank * per_rank
        return self._permutation(epoch)[start : start + per_rank].reshape(self.accumulation, self.micro_batch)

    def micro_batches(self, start_step: int) -> Iterator[list[tuple[int, int]]]:
        """Endless lists of (epoch, index), one for each of this rank's micro-batches from `start_step` on."""
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: expected 0 or more")
        step = start_step
        while True:
            epoch = self.epoch_of(step)
            for row in self.step_indices(step).tolist():
                yield [(epoch, index) for index in row]
            step += 1

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._cache:  # only the newest is kept: one of 14 million samples is 112 MB
            self._cache.clear()
            rng = np.random.default_rng((_PERMUTATION, self.seed, epoch))
            self._cache[epoch] = rng.permutation(self.num_samples)
        return self._cache[epoch]
