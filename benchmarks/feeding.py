"""What loading costs a training step: the step fed by a loader, in turns with the same step on one resident batch.

`python -m benchmarks.loader --feed-step` runs it. The share of time that is lost is measured so, not calculated from
the rates of both: a loader also takes processor time and memory bandwidth from the step that it feeds, and a part of
the GPU where that decodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from albef_ds.config import ModelConfig
from albef_ds.data.batch import PretrainingBatch
from albef_ds.data.prefetch import on_device
from benchmarks import contenders, measure
from benchmarks.contenders import Contender

RESIDENT = "none: one resident batch"
RUN_IN = 4  # fed steps before those that are timed: the queue then is as full as this step leaves it

Start = Callable[[], Iterator[PretrainingBatch]]


@contextmanager
def started(start: Callable[[], Iterator]) -> Iterator[Iterator]:
    """A loader that runs for a while: its threads have ended afterwards."""
    running = start()
    try:
        yield running
    finally:
        if hasattr(running, "close"):
            running.close()


def feed_step(
    starts: dict[str, Start], config: ModelConfig, device: torch.device, batch: int, rounds: int, steps: int
) -> Iterator[dict]:
    """Rows: each turn of each loader and of the resident batch as it ends, then one a loader with what it costs.

    Args:
        starts: {name: what starts a loader of batches for `config`}.
        rounds: turns of each; steps: timed in a turn.

    Raises:
        RuntimeError: not one of the loaders gives a batch.
    """
    resident, failures = _first(starts)
    yield from failures
    starts = {name: start for name, start in starts.items() if name not in {row["loader"] for row in failures}}
    step = contenders.build("ours bf16", config, device, resident)
    for _ in range(2):  # compiling, and the allocator's first steps
        step()
    seconds: dict[str, list[float]] = {name: [] for name in (RESIDENT, *starts)}
    waited: dict[str, list[float]] = {name: [] for name in starts}
    names = list(seconds)
    for number in range(rounds):
        for name in names:
            try:
                if name == RESIDENT:
                    step.set_batch(resident)
                    took, waits = _turn(step, None, device, steps)
                else:
                    with started(starts[name]) as loader:
                        took, waits = _turn(step, on_device(loader, device), device, steps)
                    waited[name].append(waits)
            except Exception as error:  # one loader's failure is a result, and not that of the others
                if name == RESIDENT:
                    raise
                del seconds[name]
                yield {"loader": name, "error": failure(error)}
                continue
            seconds[name].append(took)
            yield {"loader": name, "round": number, "samples/s": steps * batch / took, "waits": waits / took}
        names = [name for name in reversed(names) if name in seconds]
    yield from _summaries(seconds, waited, steps * batch)


def failure(error: Exception) -> str:
    """What a row says of a failure."""
    return measure.failure(error)


def _first(starts: dict[str, Start]) -> tuple[PretrainingBatch, list[dict]]:
    """The first loader's first batch, and rows about those that gave none before."""
    failures = []
    for name, start in starts.items():
        try:
            with started(start) as loader:
                return next(loader), failures
        except Exception as error:
            failures.append({"loader": name, "error": failure(error)})
    raise RuntimeError(f"no loader gives a batch: {failures}")


def _turn(
    step: Contender, loader: Iterator[PretrainingBatch] | None, device: torch.device, steps: int
) -> tuple[float, float]:
    """(seconds of `steps` steps, seconds in which the host waited for their batches)."""
    for _ in range(RUN_IN):
        _step(step, loader)
    _wait(device)
    began, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        waited += _step(step, loader)
    _wait(device)
    return time.perf_counter() - began, waited


def _step(step: Contender, loader: Iterator[PretrainingBatch] | None) -> float:
    """One step, on the loader's next batch if there is a loader; seconds until that batch was there."""
    asked = time.perf_counter()
    if loader is not None:
        step.set_batch(next(loader))
    waited = time.perf_counter() - asked
    step()
    return waited


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summaries(seconds: dict[str, list[float]], waited: dict[str, list[float]], samples: int) -> Iterator[dict]:
    alone = seconds.pop(RESIDENT)
    yield {"loader": RESIDENT, "samples/s": samples / measure.summary(alone)["median"], "seconds": alone}
    for name, took in seconds.items():
        slower = measure.ratio(took, alone)
        lost, low, high = (1 - 1 / slower[part] for part in ("median", "low", "high"))
        yield {
            "loader": name,
            "samples/s": samples / measure.summary(took)["median"],
            "lost to loading": f"{100 * lost:.1f} % ({100 * low:.1f} to {100 * high:.1f})",
            "lost": {"median": lost, "low": low, "high": high, "pairs": slower["pairs"]},
            "waits": sum(waited[name]) / sum(took),
            "seconds": took,
        }
