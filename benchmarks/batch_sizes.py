"""Samples a second over batch sizes, doubled until memory ends (a GPU's; on a CPU until the time does)."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

from albef_ds.config import ModelConfig
from benchmarks import contenders, measure, workload

SMALLEST, LARGEST = 8, 1024


def sweep(
    names: list[str], config: ModelConfig, device: torch.device, captions: str, minutes: float, keep: Callable
) -> list[dict]:
    """One row a contender and batch, the smallest batches first, each handed to `keep` as soon as it is there.

    A contender goes on until memory ends or it fails otherwise: its last row then says so ("error"), and the others
    go on. What the time does not allow has no row.
    """
    deadline, rows, going = time.monotonic() + 60 * minutes, [], list(names)
    batch = SMALLEST
    while going and batch <= LARGEST:
        for name in list(going):
            if time.monotonic() > deadline:
                return rows
            row = {
                "contender": name,
                "captions": captions,
                "batch": batch,
                **measured(name, config, device, captions, batch),
            }
            if "error" in row:
                going.remove(name)
            rows.append(row)
            keep(row)
        batch *= 2
    return rows


def measured(name: str, config: ModelConfig, device: torch.device, captions: str, batch: int) -> dict:
    """{"samples/s", "peak bytes"}, or {"error"}."""
    contender = None
    try:
        contender = contenders.build(name, config, device, workload.captions_batch(config, captions, batch))
        times = measure.interleaved({name: contender}, device, seconds=1.0, least=3, warmup=2)[name]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return {"samples/s": 1e3 * batch / statistics.median(times), "peak bytes": peak}
    except Exception as error:  # out of memory, a kernel that does not fit, whatever: a result of this size
        return {"error": measure.failure(error)}
    finally:
        del contender
        release(device)


def release(device: torch.device) -> None:
    """Gives what nobody holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def best(rows: list[dict]) -> list[dict]:
    """A row a contender: the largest batch that ran, and the quickest one."""
    found = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        ran = {row["batch"]: row["samples/s"] for row in rows if row["contender"] == name and "error" not in row}
        ended = next((row["error"] for row in rows if row["contender"] == name and "error" in row), None)
        quickest = max(ran, key=ran.get, default=None)
        found.append(
            {
                "contender": name,
                "largest batch": max(ran, default=None),
                "quickest batch": quickest,
                "samples/s there": ran.get(quickest),
                "ended by": ended or "the time, or the largest batch asked for",
            }
        )
    return found
