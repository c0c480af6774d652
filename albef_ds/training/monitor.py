"""What a run shows while it runs: progress, metrics.jsonl, TensorBoard events, and the list of rejected samples.

The device is asked for numbers once per log interval, in one copy; between two of them sums are kept on the device.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from albef_ds.training.json_lines import drop_lines_after, read_lines

logger = logging.getLogger(__name__)

LATEST = frozenset({"lr", "alpha", "temperature"})  # reported as they are at the step; all else is a mean of the window
NOT_PLOTTED = ("losses", "step", "time", "window")
ETA_WINDOWS = 20
WARN_EVERY = 100  # rejected samples


class Monitor:
    """Collects what one optimiser step after the other did; rank 0 writes and shows it, the others only count.

    Losses and values are those of rank 0. A line of metrics.jsonl is written every `log_every` steps and holds the
    means over the steps since the line before (`window` of them); NaN and infinities become null there and are named
    in `nonfinite`.

    Args:
        total_steps: optimiser steps of the whole run.
        start_step: steps already done when resuming; later lines of a killed run are dropped from metrics.jsonl.
        samples_per_step: of all ranks together.
        flops_per_step, peak_flops: of one rank and its device; None where unknown, then MFU is null.
        progress: show a bar; None: when stdout is a terminal. Without it a line is printed per log interval.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        rank: int,
        total_steps: int,
        samples_per_step: int,
        start_step: int = 0,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        log_every: int = 10,
        progress: bool | None = None,
    ) -> None:
        if log_every < 1:
            raise ValueError(f"log_every is {log_every}; expected at least 1")
        self.output_dir = Path(output_dir)
        self.rank = rank
        self.total_steps = total_steps
        self.start_step = start_step
        self.samples_per_step = samples_per_step
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops
        self.log_every = log_every

        self.step = start_step
        self.rejected_count = 0
        self._losses = _Mean()
        self._values = _Mean()
        self._latest: dict[str, float | Tensor] = {}
        self._windows: list[tuple[int, float, float]] = []  # steps, seconds, seconds waited for data
        self._window_steps = 0
        self._waited = 0.0
        self._window_start: float | None = None
        self._last: dict = {}
        self._device = torch.device("cpu")

        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._rejected_path = self.output_dir / "rejected.jsonl"
        self._listed = {line.get("key") for line in read_lines(self._rejected_path)}
        if rank != 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: only where it is used

        metrics = self.output_dir / "metrics.jsonl"
        drop_lines_after(metrics, start_step)
        self._metrics = open(metrics, "a", encoding="utf-8")
        # purge_step makes TensorBoard hide what a killed run had written beyond the checkpoint.
        self._events = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=start_step + 1)
        progress = sys.stdout.isatty() if progress is None else progress
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True) if progress else None

    def data_wait(self, seconds: float) -> None:
        """Time the step waited for its batch."""
        if self._window_start is None:
            self._window_start = time.perf_counter() - seconds
        self._waited += seconds

    def log(self, step: int, losses: Mapping[str, Tensor], values: Mapping[str, float | Tensor] | None = None) -> None:
        """Once per optimiser step. `step` counts the steps done, this one included: 1 to `total_steps`.

        Args:
            losses: 0-d tensors on any device, as they are minimised (their sum is the total).
            values: numbers or tensors of one element: lr, alpha, temperature, grad_norm, mi_bound_*, ...
        """
        self.step = step
        self._window_steps += 1
        if self.rank != 0:
            return
        if self._window_start is None:
            self._window_start = time.perf_counter()
        values = dict(values or {})
        # The parameter itself moves on before the interval ends: keep a copy, not the tensor.
        self._latest |= {k: _copy(v) for k, v in values.items() if k in LATEST}
        self._losses.add(losses)
        self._values.add({k: v for k, v in values.items() if k not in LATEST})
        if self._bar is not None:
            self._bar.update(1)
        if step % self.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Ends the window here, before its time; called before a checkpoint, a resumed run writes the same windows."""
        if self.rank != 0 or self._window_steps == 0:
            return
        losses, values = self._read_device()
        now = time.perf_counter()
        window = (self._window_steps, max(now - self._window_start, 1e-9), self._waited)
        self._windows.append(window)
        self._window_steps, self._waited, self._window_start = 0, 0.0, now

        losses.setdefault("total", sum(losses.values()))
        self._last = {"step": self.step, "losses": losses, **values, **self._speed(window), "time": time.time()}
        self._write(self._last)
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(self._last, brief=True), refresh=False)
        else:
            with contextlib.suppress(OSError):  # nobody reads it any more; metrics.jsonl has it all the same
                print(self._text(self._last), flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside (checkpoint, evaluation) out of the step times."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._window_start is not None:
                self._window_start += time.perf_counter() - start

    def keys(self, step: int, keys: Iterable[str]) -> None:
        """Appends the samples of one micro-batch of step `step` to keys_rank_N.jsonl of this rank."""
        with open(self.output_dir / f"keys_rank_{self.rank:05d}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "keys": list(keys)}) + "\n")

    def rejected(self, samples: Iterable[tuple[str, str]]) -> None:
        """Samples (key, reason) that a loader had to replace. Any rank; each key is listed once in rejected.jsonl."""
        for key, reason in samples:
            if self.rejected_count % WARN_EVERY == 0:
                logger.warning(
                    "rank %d: sample %s rejected (%s); %d so far, listed in %s",
                    *(self.rank, _one_line(key), _one_line(reason), self.rejected_count + 1, self._rejected_path),
                )
            self.rejected_count += 1
            if key in self._listed:
                continue
            self._listed.add(key)
            line = json.dumps({"key": key, "reason": reason, "rank": self.rank, "step": self.step}) + "\n"
            # All ranks share the file: one append of one whole line each.
            file = os.open(self._rejected_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)

    def close(self) -> dict:
        """Writes what is left, and returns the run in numbers; rates are medians of the windows after warming up."""
        if self.rank != 0:
            return {}
        self.flush()
        if self._bar is not None:
            self._bar.close()
        self._events.close()
        self._metrics.close()
        steady = self._windows[max(1, len(self._windows) // 10) :] or self._windows
        rate = statistics.median([steps / seconds for steps, seconds, _ in steady]) if steady else None
        seconds = sum(seconds for _, seconds, _ in self._windows)
        return {
            "steps": self.step,
            "start_step": self.start_step,
            "samples": (self.step - self.start_step) * self.samples_per_step,
            "seconds": seconds,
            "samples_per_s": rate and rate * self.samples_per_step,
            "data_wait": sum(w for _, _, w in steady) / sum(s for _, s, _ in steady) if steady else None,
            "mfu": self._mfu(rate),
            "memory_gib": self._last.get("memory_gib"),
            "losses": {k: _finite(v) for k, v in self._last.get("losses", {}).items()},
            "rejected": len({line.get("key") for line in read_lines(self._rejected_path)}),
        }

    def _read_device(self) -> tuple[dict[str, float], dict[str, float]]:
        """The window's losses and values as host numbers: one copy from the device for all of them."""
        sums = self._losses.sums | self._values.sums | self._latest
        on_device = {k: v for k, v in sums.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
        if on_device:
            self._device = next(iter(on_device.values())).device
            sums |= dict(zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True))
        sums = {k: float(v) for k, v in sums.items()}
        losses = {k: sums[k] / n for k, n in self._losses.counts.items()}
        values = {k: sums[k] for k in self._latest} | {k: sums[k] / n for k, n in self._values.counts.items()}
        self._losses, self._values, self._latest = _Mean(), _Mean(), {}
        return losses, values

    def _speed(self, window: tuple[int, float, float]) -> dict:
        steps, seconds, waited = window
        recent = self._windows[-ETA_WINDOWS:]
        pace = sum(s for _, s, _ in recent) / sum(n for n, _, _ in recent)
        return {
            "window": steps,
            "samples_per_s": steps * self.samples_per_step / seconds,
            "data_wait": min(waited / seconds, 1.0),
            "mfu": self._mfu(steps / seconds),
            "memory_gib": _memory_gib(self._device),
            "eta_s": pace * max(self.total_steps - self.step, 0),
        }

    def _mfu(self, steps_per_s: float | None) -> float | None:
        if not (steps_per_s and self.flops_per_step and self.peak_flops):
            return None
        return self.flops_per_step * steps_per_s / self.peak_flops

    def _write(self, line: dict) -> None:
        flat = {f"loss/{k}": v for k, v in line["losses"].items()}
        flat |= {f"train/{k}": v for k, v in line.items() if k not in NOT_PLOTTED and v is not None}
        for tag, value in flat.items():
            self._events.add_scalar(tag, value, self.step)
        bad = [tag.split("/", 1)[1] for tag, value in flat.items() if not math.isfinite(value)]
        line = {k: _finite(v) for k, v in line.items()} | {
            "losses": {k: _finite(v) for k, v in line["losses"].items()},
            **({"nonfinite": bad} if bad else {}),
        }
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def _text(self, line: dict, brief: bool = False) -> str:
        parts = [f"{name} {value:.4f}" for name, value in line["losses"].items()]
        if line.get("lr") is not None:
            parts.append(f"lr {line['lr']:.2e}")
        parts.append(f"{line['samples_per_s']:.1f} samples/s")
        if line["mfu"] is not None:
            parts.append(f"MFU {line['mfu']:.1%}")
        if brief:  # the bar shows step and ETA itself
            return "  ".join(parts)
        parts += [f"waiting for data {line['data_wait']:.0%}", f"ETA {timedelta(seconds=round(line['eta_s']))}"]
        return f"step {self.step}/{self.total_steps}  " + "  ".join(parts)


class _Mean:
    """Running sums of named scalars, left on the device they come from."""

    def __init__(self) -> None:
        self.sums: dict[str, float | Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, scalars: Mapping[str, float | Tensor]) -> None:
        for name, value in scalars.items():
            if name not in self.sums:
                self.sums[name] = _copy(value)
            elif isinstance(value, Tensor):
                self.sums[name] += value.detach().reshape(())
            else:
                self.sums[name] += float(value)
            self.counts[name] = self.counts.get(name, 0) + 1


def _copy(value: float | Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return float(value)
    return value.detach().reshape(()).to(torch.float32, copy=True)  # a copy: static buffers get overwritten


def _one_line(text: str) -> str:
    """For a terminal: a name from a stranger's list may hold line ends, and sequences that move the cursor."""
    return text if text.isprintable() else ascii(text)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _memory_gib(device: torch.device) -> float:
    """Most memory held so far: by PyTorch on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
