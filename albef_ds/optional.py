"""Which optional packages are here: the one place that looks. None of them is imported to find out.

find("dali").available      describe()      # lines for people
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from ctypes.util import find_library
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """What to look for, under which names it is installed, what it is good for and how to get it."""

    module: str
    distributions: tuple[str, ...]
    purpose: str
    install: str
    problem: Callable[[], str | None] = lambda: None  # why it cannot be used although the module is there


@dataclass(frozen=True)
class Presence:
    """`reason` says in words why a package is not available, and what to do; empty where it is."""

    available: bool
    version: str | None
    reason: str


def wrong_apex() -> str | None:
    """NVIDIA's apex and PyPI's project of the same name, told apart by the files that only NVIDIA's has."""
    spec = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]
    if not any((folder / "normalization" / "fused_layer_norm.py").is_file() for folder in folders):
        return (
            "the apex that is installed is another project of that name (pip install apex gives it), not NVIDIA's: "
            "uninstall it and build https://github.com/NVIDIA/apex"
        )
    missing = [name for name in ("amp_C", "fused_layer_norm_cuda") if importlib.util.find_spec(name) is None]
    if missing:
        return f"NVIDIA's apex was built without {' and '.join(missing)}: build it again with its CUDA extensions"
    return None


def old_varlen() -> str | None:
    """torch 2.10's varlen_attn takes other arguments than that of 2.11."""
    version = metadata.version("torch")
    major, minor = (int(part) for part in version.split(".")[:2])
    return None if (major, minor) >= (2, 11) else f"torch {version} is too old for it: 2.11 is needed"


PACKAGES = {
    "flash-attn": Package(
        "flash_attn", ("flash-attn",), "attention on packed rows, with dropout", "pip install 'albef_ds[flash]'"
    ),
    "varlen": Package(
        "torch.nn.attention.varlen",
        ("torch",),
        "attention on packed rows by torch's copy of flash-attn",
        "pip install 'torch>=2.11'",
        old_varlen,
    ),
    "apex": Package(
        "apex", ("apex",), "optimizer.fused: apex", "build https://github.com/NVIDIA/apex with CUDA", wrong_apex
    ),
    "dali": Package(
        "nvidia.dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "decoding images",
        "pip install 'albef_ds[dali]' (on CUDA 12: 'albef_ds[dali-cuda12]')",
    ),
    "triton": Package("triton", ("triton",), "kernels of ITC and hard negatives on a GPU", "pip install triton"),
    "pyarrow": Package("pyarrow", ("pyarrow",), "Parquet lists for data pack", "pip install 'albef_ds[parquet]'"),
    "gradio": Package("gradio", ("gradio",), "the page of albef_ds serve", "pip install 'albef_ds[page]'"),
    "fsspec": Package("fsspec", ("fsspec",), "shards from URLs", "pip install 'albef_ds[remote]'"),
}


@cache
def find(name: str) -> Presence:
    """Looks once for a package of PACKAGES; one that is there but cannot be used is warned of, once."""
    package = PACKAGES[name]
    if not module_exists(package.module):
        return Presence(False, None, f"not installed ({package.install})")
    problem = package.problem()
    if problem:
        log.warning("%s cannot be used: %s", name, problem)
    return Presence(problem is None, _version(package.distributions), problem or "")


def describe() -> list[str]:
    """One line a package: its version, or why it is not used and what to do; and what it is for."""
    lines = []
    for name, package in PACKAGES.items():
        found = find(name)
        state = (found.version or "found") if found.available else f"no: {found.reason}"
        lines.append(f"{name:<10}  {package.purpose}: {state}")
    return lines


@cache
def tcmalloc() -> str | None:
    """A library of the system's, not a package: tcmalloc, whose `malloc` a CPU's ranks are quicker with.

    On a CPU PyTorch allocates every result anew, aligned; glibc's posix_memalign took 18 % of a rank's samples in
    fine-tuning for VQA (benchmarks/results/vqa.md).
    """
    return find_library("tcmalloc_minimal") or find_library("tcmalloc")


def module_exists(module: str) -> bool:
    """Whether a module could be imported; of a dotted name also its parents, as find_spec imports these."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
