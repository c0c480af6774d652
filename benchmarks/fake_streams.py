"""Streams and events that run nothing and know what comes before what; and the races that follow from it.

They stand in place of torch.cuda's on a machine without a GPU (benchmarks.fake_ranks). Of two operations on different
streams one comes first only if the other's stream has waited for it: by an event, by `wait_stream`, or because the host
has waited (Lamport's clocks). What PyTorch's allocator does with memory that was given back (`record_stream`) is not
followed.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef


class Race(RuntimeError):
    """A stream uses what another one may still be writing, or writes what another one may still be reading."""


class Stream:
    """torch.cuda.Stream."""

    made: list[Stream] = []

    def __init__(self, device=None, priority: int = 0, name: str = "side") -> None:
        self.name = name
        self.newest = 0  # of its operations; they are numbered over all streams
        self.after: Counter[Stream] = Counter()  # of every other stream, the newest operation that is waited for
        Stream.made.append(self)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        self.after |= event.after

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def query(self) -> bool:
        return True


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_, **__) -> None:
        self.after: Counter[Stream] = Counter()

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        self.after = stream.after | Counter({stream: stream.newest})

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        for stream in Stream.made:  # the host waits: whatever it launches next, and wherever, comes later
            stream.wait_event(self)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


MAIN = Stream(name="main")
_thread = threading.local()  # autograd calls hooks in threads of its own


def current_stream(device=None) -> Stream:
    """torch.cuda.current_stream."""
    return getattr(_thread, "stream", MAIN)


@contextmanager
def on_stream(stream: Stream | None) -> Iterator[None]:
    """torch.cuda.stream."""
    before = current_stream()
    _thread.stream = stream or before
    try:
        yield
    finally:
        _thread.stream = before


def synchronize(device=None) -> None:
    """torch.cuda.synchronize."""
    for stream in Stream.made:
        stream.synchronize()


@dataclass
class _Use:
    """Which operation of which stream wrote some memory last, and which have read it since."""

    stream: Stream
    written: int
    read: dict[Stream, int] = field(default_factory=dict)


class Order:
    """Goes along with the operations of a run and raises Race where nothing says which of two comes first."""

    _numbers = count(1)

    def __init__(self) -> None:
        self._uses: dict[StorageWeakRef, _Use] = {}

    def add(self, func: OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        """One operation, on the current stream."""
        if func.is_view or func.namespace == "prim" or "empty" in func._opname:  # looks at no memory
            return
        stream, number = current_stream(), next(self._numbers)
        stream.newest = number
        changed = written_arguments(func)
        for key, value in [*enumerate(args), *kwargs.items()]:
            for tensor in tensors_in(value):
                self._use(tensor, func, stream, number, changed is None or key in changed)
        for tensor in tensors_in(result):
            self._uses.setdefault(memory_of(tensor), _Use(stream, number))

    def _use(self, tensor: Tensor, func: OpOverload, stream: Stream, number: int, writes: bool) -> None:
        memory = memory_of(tensor)
        use = self._uses.get(memory)
        if use is not None:
            self._check(use, func, stream, writes, tensor)
        if use is None or writes:
            self._uses[memory] = _Use(stream, number)
        else:
            use.read[stream] = number

    @staticmethod
    def _check(use: _Use, func: OpOverload, stream: Stream, writes: bool, tensor: Tensor) -> None:
        earlier = [("written", use.stream, use.written)]
        if writes:
            earlier += [("read", *item) for item in use.read.items()]
        for what, other, number in earlier:
            if other is not stream and stream.after[other] < number:
                shape = ", ".join(map(str, tensor.shape))
                raise Race(
                    f"{func} on stream {stream.name} does not wait for stream {other.name}, on which its tensor "
                    f"({tensor.dtype} [{shape}]) is {what}"
                )


def memory_of(tensor: Tensor) -> StorageWeakRef:
    """What a tensor shares with its views, and with nothing that comes after it."""
    return StorageWeakRef(tensor.untyped_storage())


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


@functools.cache
def written_arguments(func: OpOverload) -> frozenset[int | str] | None:
    """What an operator changes, by place and by name; None: perhaps every argument."""
    if func.namespace == "c10d":  # its schemas do not say
        return None
    changed = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return frozenset(key for pair in changed for key in pair)
