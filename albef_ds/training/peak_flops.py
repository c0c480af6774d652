"""The most FLOP/s a device can do, against which a run's own rate (MFU) is put."""

from __future__ import annotations

import functools
import math
import re
import time

import torch

# Dense tensor-core rates without sparsity, fp32 accumulation, in FLOP/s: bf16, and fp16 for V100, which has no bf16.
# First match wins. From NVIDIA's data sheets; where those quote sparse numbers (Hopper, Ada), half of them.
PEAK_FLOPS = (
    (r"\bMIG\b", None),  # a slice of a card: its share is not in the name
    (r"\bH(100|200) NVL\b", 835.5e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(H100|H200|GH200)\b", 989e12),
    (r"\bB200\b", 2250e12),
    (r"\bA100\b", 312e12),
    (r"\bV100-PCIE\b", 112e12),
    (r"\bV100\b", 125e12),
    (r"\bA30\b", 165e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b", 71e12),
)


def peak_flops_of(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float | None:
    """Peak FLOP/s of a device in dense bf16 matrix products; None for a GPU not in the table.

    dtype: what a CPU's products are measured in.

    A CPU has no honest data-sheet number for the cores a process may use, so there it is measured (a second at most).
    """
    device = torch.device(device)
    if device.type != "cuda":
        return _measured_matmul_flops(torch.get_num_threads(), dtype)
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_source(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Where `peak_flops_of` has its number from, in words for a report."""
    if torch.device(device).type == "cuda":
        return "NVIDIA data sheet, dense bf16 (V100: fp16)"
    name = str(dtype).removeprefix("torch.")
    return f"measured: {name} matrix product of 1024 x 1024, {torch.get_num_threads()} thread(s)"


def peak_flops_by_name(name: str) -> float | None:
    return next((flops for pattern, flops in PEAK_FLOPS if re.search(pattern, name)), None)


@functools.cache
def _measured_matmul_flops(threads: int, dtype: torch.dtype) -> float:  # threads: the rate belongs to them
    a, b = (
        torch.ones(1024, 1024, dtype=dtype) for _ in range(2)
    )  # not random: a resumed run must draw as the first did
    best, deadline = math.inf, time.perf_counter() + 0.5
    while best == math.inf or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
