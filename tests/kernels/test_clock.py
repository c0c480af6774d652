"""How kernels are timed on a GPU, acted out by stand-ins: what is asked of it, in which order."""

import time

import pytest
import torch

from albef_ds.kernels import tuning
from benchmarks import kernels, measure


class ActedGPU:
    """Notes what is asked of a GPU. A sleep keeps it busy for so many `measure.CYCLES`; all else takes no time."""

    def __init__(self, monkeypatch):
        self.asked, self.busy_until = [], 0.0
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def zero_(self):
        self.asked.append("flush")

    def sleep(self, cycles):
        self.asked.append("sleep")
        self.busy_until = time.perf_counter() + cycles / measure.CYCLES / 1e3

    def event(self, enable_timing):
        assert enable_timing
        return ActedEvent(self)

    def call(self):
        self.asked.append("call")

    def clock(self, **options):
        clock = measure.Clock(torch.device("cpu"), **options)
        clock.flush = self
        return clock


class ActedEvent:
    """Has happened once the GPU has slept."""

    def __init__(self, gpu):
        self.gpu, self.name = gpu, None

    def record(self):
        self.name = "end" if "begin" in self.gpu.asked else "begin"
        self.gpu.asked.append(self.name)

    def query(self):
        return time.perf_counter() >= self.gpu.busy_until

    def synchronize(self):
        self.gpu.asked.append("wait")

    def elapsed_time(self, end):
        assert (self.name, end.name) == ("begin", "end")
        return 1.5


@pytest.fixture
def gpu(monkeypatch):
    return ActedGPU(monkeypatch)


def test_a_head_start_lies_between_the_flush_and_the_first_event(gpu):
    assert gpu.clock(head_start=50.0)(gpu.call) == 1.5
    assert gpu.asked == ["flush", "sleep", "begin", "call", "end", "wait"]


def test_whole_steps_get_no_head_start(gpu):
    """What a clock does by default, and so `interleaved`: steps must show their host time."""
    assert gpu.clock()(gpu.call) == 1.5
    assert gpu.asked == ["flush", "begin", "call", "end", "wait"]


def test_a_call_that_outlasts_its_head_start_is_noticed(gpu):
    clock = gpu.clock(head_start=100.0)

    def slow():
        time.sleep(0.15)

    for call in (gpu.call, slow):
        gpu.asked.clear()
        clock(call)
    assert clock.overtaken == {gpu.call: 0, slow: 1}


def test_tuning_times_kernels_and_not_their_launches(gpu, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *args, **options: gpu)
    assert tuning.time_plan(gpu.call, repeats=1) == 1.5
    assert gpu.asked == ["call", "flush", "sleep", "begin", "call", "end", "wait"]  # the first call compiles

    def too_large():
        raise torch.OutOfMemoryError("out of memory")

    assert tuning.time_plan(too_large) == float("inf")


def test_a_row_of_the_kernels_says_what_the_host_takes_and_whether_it_held_the_gpu_up(gpu, monkeypatch):
    def slow():
        time.sleep(0.03)

    def act(*args, **options):
        gpu.asked.clear()
        return clock(*args, **options)

    given = []
    clock = gpu.clock()

    def build_clock(device, head_start):
        given.append(head_start)
        clock.head_start = head_start
        act.overtaken = clock.overtaken
        return act

    monkeypatch.setattr(measure, "Clock", build_clock)
    monkeypatch.setattr(measure, "peak_memory", lambda call, device: 2**20)
    calls = {"quick": lambda: gpu.call, "slow": lambda: slow, "broken": lambda: 1 / 0}
    broken, quick, late = kernels.compare(calls, torch.device("cuda"), 0.1, "quick")
    assert broken == {"contender": "broken", "error": "ZeroDivisionError: division by zero"}
    assert quick["host ms"] < 5 and quick["host-bound"] is False and quick["ms"] == 1.5 and quick["peak MB"] == 1
    assert late["host ms"] >= 30 and late["host-bound"] is True
    assert given == [20.0]  # twice the slowest host, but no more than this
    calls.pop("slow")
    kernels.compare(calls, torch.device("cuda"), 0.01, "quick")
    assert given[1] == 2.0
