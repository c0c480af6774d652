"""What our Triton kernels do, counted from the loads, stores and products that they execute in Triton's interpreter.

Bytes are counted twice: all that loads and stores ask for, as the caches see it; and what is left if every address is
read once and written once a launch, the least that memory must move. With TRITON_INTERPRET=1 set before Triton is
imported, on any CPU.

The kernels of the loss are run on a short queue: what they move is a sum of a constant, a share for each column of the
queue and a share for each split of it, which three short runs tell apart (tests/kernels/test_traffic.py holds
it against a whole run).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import numpy as np
import torch

from albef_ds.kernels import launch
from albef_ds.kernels.launch import Plan


@dataclass(frozen=True)
class Problem:
    """One call of queue_contrastive_loss. `dtype` is the queues'."""

    batch: int
    length: int
    dim: int
    dtype: torch.dtype
    with_ids: bool = False
    with_queue_ids: bool = False
    with_grad: bool = True


class Traffic:
    """What was counted of each kernel, by its name."""

    def __init__(self):
        self.launches: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()  # bytes of all loads and stores
        self.least: Counter[str] = Counter()  # bytes, each address once a launch for reading and once for writing
        self.flops: Counter[str] = Counter()  # of matrix products, whole tiles

    def add(self, other: Traffic) -> None:
        for name in vars(self):
            getattr(self, name).update(getattr(other, name))


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what interpreted kernels do inside; yields a Traffic.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1, so that nothing would be counted.
    """
    if not launch.interpreted():
        raise RuntimeError(
            "loads and stores are counted in Triton's interpreter: set TRITON_INTERPRET=1 before it is imported"
        )
    from triton.runtime import interpreter

    found, running = Traffic(), _Launch("")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    run = executor.__call__

    def counted_load(self, pointers, mask, *rest):
        running.read.add(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        running.written.add(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self, a, b, *rest):
        found.flops[running.kernel] += 2 * math.prod(a.data.shape) * b.data.shape[-1]
        return dot(self, a, b, *rest)

    def counted_run(self, *arguments, **options):
        nonlocal running
        running = _Launch(self.fn.__name__)
        run(self, *arguments, **options)
        found.launches[running.kernel] += 1
        for touched in (running.read, running.written):
            found.asked[running.kernel] += touched.asked
            found.least[running.kernel] += touched.least()

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_dot", counted_dot),
        mock.patch.object(executor, "__call__", counted_run),
    ):
        yield found


class _Touched:
    """Addresses that one launch reads, or writes."""

    def __init__(self):
        self.asked = 0
        self._addresses: dict[int, list[np.ndarray]] = defaultdict(list)  # by bytes of an element

    def add(self, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data]
        self.asked += addresses.size * size
        self._addresses[size].append(np.unique(addresses))

    def least(self) -> int:
        return sum(size * np.unique(np.concatenate(found)).size for size, found in self._addresses.items())


class _Launch:
    def __init__(self, kernel: str):
        self.kernel, self.read, self.written = kernel, _Touched(), _Touched()


def contrastive(problem: Problem, plan: Plan) -> Traffic:
    """Of the loss's kernels, launched by `plan`; exact where the queue is a whole number of the plan's tiles."""
    width = math.lcm(plan.statistics.block_n, plan.gradient.block_n)
    short, longer, divided = (
        _run_contrastive(problem, plan, columns * width, splits) for columns, splits in ((1, 1), (2, 1), (2, 2))
    )
    whole = Traffic()
    whole.launches.update(short.launches)
    for counter in ("asked", "least", "flops"):
        once, twice, apart = (getattr(run, counter) for run in (short, longer, divided))
        for kernel, moved in once.items():
            a_column, a_split = (twice[kernel] - moved) / width, apart[kernel] - twice[kernel]
            beyond = a_column * (problem.length - width) + a_split * (plan.splits - 1)
            getattr(whole, counter)[kernel] = round(moved + beyond)
    return whole


@cache
def _run_contrastive(problem: Problem, plan: Plan, length: int, splits: int) -> Traffic:
    from albef_ds.kernels import queue_contrastive_triton

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=problem.dtype)

    features = [zeros(problem.batch, problem.dim) for _ in range(4)]
    queues = [zeros(length, problem.dim) for _ in range(2)]
    ids = torch.zeros(problem.batch, dtype=torch.int64) if problem.with_ids else None
    queue_ids = torch.zeros(length, dtype=torch.int64) if problem.with_queue_ids else None
    scalars = torch.ones(1), torch.zeros(())
    with _planned(Plan(plan.statistics, plan.gradient, splits)), counting() as found:
        queue_contrastive_triton.forward(*features, *queues, *scalars, ids, queue_ids, problem.with_grad)
    return found


@contextmanager
def _planned(plan: Plan):
    with mock.patch.object(launch, "plan", lambda *_, **__: plan):
        yield


@cache
def negatives(batch: int, with_ids: bool, dtype: torch.dtype = torch.float32) -> Traffic:
    """Of the draw of hard negatives from logits [batch, batch] of `dtype`."""
    from albef_ds.kernels import hard_negatives_triton

    logits, noise = torch.zeros(batch, batch, dtype=dtype), torch.ones(batch, batch)
    with counting() as found:
        hard_negatives_triton.race(logits, noise, torch.zeros(batch, dtype=torch.int64) if with_ids else None)
    return found
