"""The order of training over shards: shuffled anew each epoch, yet near in time what is near on disk.

An epoch goes through the shards in a shuffled order and shuffles again within a buffer of samples, so that a step reads
from the few shards of its buffer only. A data set smaller than the buffer is shuffled as a whole.

Several corpora are mixed by weight: the number of times that an epoch goes through a corpus, 1 for each unless told. At
0.5 an epoch takes a half of it, the next epoch the other half.

All of it is a function of (seed, epoch): no state but the step number, as `SampleOrder` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from albef_ds.data.order import SampleOrder

_SHARDS, _MIX = 3, 4  # first words of seeds; order.py has 1 and 2


@dataclass(frozen=True)
class ShardOrder(SampleOrder):
    """`SampleOrder` over shards; made by `over`, since num_samples (of an epoch) follows from the rest."""

    corpora: tuple[
        tuple[int, ...], ...
    ] = ()  # of each corpus the samples of each shard; corpora number their samples on
    taken: tuple[int, ...] = ()  # of each corpus the samples an epoch takes
    buffer: int = 100_000

    @classmethod
    def over(
        cls,
        corpora: Sequence[Sequence[int]],
        weights: Sequence[float] = (),
        buffer: int = 100_000,
        **numbers: int,
    ) -> ShardOrder:
        """weights: one a corpus, or none. numbers: micro_batch and so on of `SampleOrder`. Raises ValueError."""
        if weights and len(weights) != len(corpora):
            raise ValueError(f"{len(weights)} weights for {len(corpora)} folders of shards: expected one each, or none")
        if any(not weight > 0 for weight in weights):
            raise ValueError(f"weights are {tuple(weights)}: expected numbers above 0")
        if buffer < 1:
            raise ValueError(f"shuffle_buffer is {buffer}: expected at least 1")
        sizes = [sum(shards) for shards in corpora]
        taken = tuple(max(1, round(n * w)) for n, w in zip(sizes, weights or [1] * len(sizes), strict=True))
        return cls(sum(taken), corpora=tuple(map(tuple, corpora)), taken=taken, buffer=buffer, **numbers)

    @property
    def total(self) -> int:
        return sum(map(sum, self.corpora))

    def step_indices(self, step: int) -> np.ndarray:
        return super().step_indices(step) % self.total

    def micro_batches(self, start_step: int) -> Iterator[list[tuple[int, int]]]:
        """As `SampleOrder`'s; the epoch of a sample counts the times its corpus has been gone through."""
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}: expected 0 or more")
        step, total = start_step, self.total
        while True:
            for row in super().step_indices(step).tolist():
                yield [divmod(value, total) for value in row]
            step += 1

    def _permutation(self, epoch: int) -> np.ndarray:
        """[num_samples] int64: pass * total + index, the pass being a corpus's own epoch."""
        if epoch not in self._cache:
            self._cache.clear()
            self._cache[epoch] = self._mixed(epoch)
        return self._cache[epoch]

    def _mixed(self, epoch: int) -> np.ndarray:
        streams = [self._stream(corpus, epoch) for corpus in range(len(self.corpora))]
        if len(streams) == 1:
            return streams[0]
        # Which corpus has its turn is shuffled; within a corpus its own order stays, and with it what is near on disk.
        turns = np.repeat(np.arange(len(streams), dtype=np.int16), self.taken)
        np.random.default_rng((_MIX, self.seed, epoch)).shuffle(turns)
        mixed = np.empty(turns.size, dtype=np.int64)
        for corpus, stream in enumerate(streams):
            mixed[turns == corpus] = stream
        return mixed

    def _stream(self, corpus: int, epoch: int) -> np.ndarray:
        """This epoch's part of the endless passes through one corpus."""
        size, taken = sum(self.corpora[corpus]), self.taken[corpus]
        first, last = epoch * taken // size, ((epoch + 1) * taken - 1) // size
        passes = [p * self.total + self._pass(corpus, p) for p in range(first, last + 1)]
        at = epoch * taken - first * size
        return np.concatenate(passes)[at : at + taken]

    def _pass(self, corpus: int, number: int) -> np.ndarray:
        """[size] int64: all samples of a corpus, by shards and then within the buffer shuffled."""
        shards = np.array(self.corpora[corpus])
        start = sum(map(sum, self.corpora[:corpus]))
        starts = start + np.cumsum(shards) - shards
        rng = np.random.default_rng((_SHARDS, self.seed, corpus, number))
        order = np.concatenate([np.arange(starts[s], starts[s] + shards[s]) for s in rng.permutation(len(shards))])
        for at in range(0, order.size, self.buffer):
            rng.shuffle(order[at : at + self.buffer])
        return order
