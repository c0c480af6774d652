"""What every benchmark needs: where it runs, how long a call takes, how sure that is, and what the chip could do.

Rivals are timed in turns within one run (`interleaved`), so that a warming chip or a busy neighbour hits all of them.
Limits (`copy_bandwidth`, `matmul_rate`) are measured on the spot, not read from a data sheet.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import torch

from albef_ds.data.files import write_atomically
from benchmarks import ROOT

PACKAGES = ("torch", "triton", "deepspeed", "numpy", "transformers", "flash-attn", "liger-kernel", "inf-cl")
CYCLES = 2_500_000  # of the fastest GPUs' clocks in a millisecond; on a slower one a head start is longer


def pick_device(name: str | None = None) -> torch.device:
    """The device `name`, or the GPU if there is one, else the CPU. Raises RuntimeError for a GPU that is not there."""
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(f"--device {name} was asked for, and torch sees no GPU")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.index:
        torch.cuda.set_device(device)  # events are recorded on the current GPU, whichever computes
    return device


def device(text: str) -> str:
    """A device, as the type of a command line's argument."""
    try:
        kind = pick_device(text).type
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    return text


def environment(device: torch.device) -> dict:
    """Device, driver, versions, commit and time: what a number means nothing without."""
    found = dict(device=device_name(device), kind=device.type, python=platform.python_version(), commit=commit())
    found |= dict(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), system=platform.platform())
    found["packages"] = {name: version for name in PACKAGES if (version := package_version(name))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= dict(
            driver=nvidia_smi("driver_version"),
            cuda=torch.version.cuda,
            clocks=nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm"),
            multiprocessors=properties.multi_processor_count,
            memory_bytes=properties.total_memory,
        )
    else:
        found["threads"] = torch.get_num_threads()
    return found


def device_name(device: torch.device) -> str:
    """The maker's name of the chip."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The installed version, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the working tree, with "+" where something differs from it; "unknown" outside git."""

    def git(*arguments):
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")  # where results are being written
        return f"{head}{'+' if changed else ''}" if head else "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def nvidia_smi(field: str) -> str:
    """One query of nvidia-smi, "unknown" where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def failure(error: Exception) -> str:
    """What a row says of a contender that failed."""
    return f"{type(error).__name__}: {error}"[:300]


class Clock:
    """Milliseconds of one call. On a GPU: between events, the L2 cache overwritten before, as a training step does.

    Launching a small kernel takes the host longer than running it takes the GPU, which is then timed waiting for
    Python. With a head start the GPU is kept busy first, until the host has queued the whole call.

    Args:
        head_start: milliseconds that the host gets; 0, none, for whole steps, which must show their host time.
    """

    def __init__(self, device: torch.device, head_start: float = 0.0):
        self.device, self.head_start = device, head_start
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None
        self.overtaken: Counter[Callable] = Counter()  # calls of which the GPU began before the host had queued the end

    def __call__(self, call: Callable) -> float:
        if self.flush is None:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        if self.head_start:
            torch.cuda._sleep(int(self.head_start * CYCLES))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self.overtaken[call] += begin.query()
        end.synchronize()
        return begin.elapsed_time(end)


def interleaved(
    calls: dict,
    device: torch.device,
    seconds: float = 2.0,
    least: int = 5,
    warmup: int = 3,
    clock: Clock | None = None,
) -> dict:
    """{name: milliseconds of every round} of all calls in turns, forwards and backwards (A B B A), for about `seconds`.

    At least `least` rounds whatever they take; `warmup` calls of each come before and are not counted. `clock` is one
    without a head start if none is given.
    """
    clock = clock or Clock(device)
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples = {name: [] for name in calls}
    deadline, order = time.monotonic() + seconds, list(calls)
    while len(samples[order[0]]) < least or time.monotonic() < deadline:
        for name in order:
            samples[name].append(clock(calls[name]))
        order.reverse()
    return samples


def host_milliseconds(call: Callable, device: torch.device, rounds: int = 5) -> float:
    """Median time until a call returns to the host: the GPU idle before, and waited for only if the call does so."""
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def summary(samples: list[float]) -> dict:
    """Median, 20 % and 80 % quantiles and number of samples."""
    ordered = sorted(samples)

    def at(q):
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return dict(median=statistics.median(ordered), q20=at(0.2), q80=at(0.8), count=len(ordered))


def publish(result: dict, folder: Path | None, name: str) -> None:
    """Prints a result as JSON and, where a folder is given, keeps it there."""
    text = json.dumps(result, indent=1)
    print(text)
    if folder is not None:
        write_atomically(folder / name, text)


def folder(text: str) -> Path:
    """A folder for results, as the type of a command line's argument: it need not be there yet, but must be able to."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file, and a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written into")
    return path


def tell(found: dict, page: str, as_json: bool, out: Path | None, name: str, plot: Callable | None = None) -> None:
    """Prints a result, as its page or as JSON. Where a folder is given, it keeps both there, and the plot.

    Args:
        name: of the files, without their endings.
        plot: (result, path of the picture) to nothing.
    """
    text = json.dumps(found, indent=1)
    print(text if as_json else page)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"{name}.json", text + "\n")
        write_atomically(out / f"{name}.md", page + "\n")
        if plot is not None:
            plot(found, out / f"{name}.png")


class Rows:
    """The rows of a benchmark, each on the disk as soon as it is there: whatever stops it, finished rows stay.

    Args:
        path: the file of JSON lines that rows are appended to, made with its folder at the first one; None keeps them
            in memory alone.
    """

    def __init__(self, path: Path | None):
        self.path, self.rows = path, []

    def add(self, row: dict) -> None:
        """Keeps one row; where there is a path, it is on the disk when this returns."""
        self.rows.append(row)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            _drop_torn_line(file)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _drop_torn_line(file: BinaryIO) -> None:
    """Cuts off what a killed run left after the last whole line, or the next row would be glued to it."""
    size = file.seek(0, os.SEEK_END)
    if size == 0 or (file.seek(size - 1), file.read(1))[1] == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a file of `Rows`; a last one that a killed process left torn is passed over."""
    *whole, _torn = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def ratio(slow: list[float], fast: list[float], draws: int = 1000, seed: int = 0) -> dict:
    """How many times faster `fast` is, from paired samples: median ratio with its 95 % bootstrap interval."""
    pairs = [a / b for a, b in zip(slow, fast, strict=False)]
    chance = random.Random(seed)
    medians = sorted(statistics.median(chance.choices(pairs, k=len(pairs))) for _ in range(draws))
    low, high = medians[int(0.025 * draws)], medians[int(0.975 * draws)]
    return dict(median=statistics.median(pairs), low=low, high=high, pairs=len(pairs))


def peak_memory(call, device: torch.device) -> int | None:
    """Bytes that the allocator holds at the call's highest, above those before it; None on a CPU (not measured)."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second, read plus written, of a large device copy."""
    size = (1 << 30) if device.type == "cuda" else (64 << 20)
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    samples = interleaved({"copy": lambda: target.copy_(source)}, device, seconds)["copy"]
    return 2 * size / (statistics.median(samples) * 1e-3)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16, seconds: float = 0.5) -> float:
    """FLOP per second of a large square matrix product in `dtype`, TF32 left off."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    samples = interleaved({"matmul": lambda: a @ b}, device, seconds)["matmul"]
    return 2 * size**3 / (statistics.median(samples) * 1e-3)


def table(rows: list[dict], columns: list[str]) -> str:
    """A Markdown table; what a row lacks is "not measured"."""

    def cell(value):
        if value is None:
            return "not measured"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows])
