"""What is installed: versions against what this package asks for, optional packages, compilers, left-over locks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from albef_ds import optional
from albef_ds.doctor.finding import Finding, ok, problem, warning
from albef_ds.training.extension_lock import FOREIGN_SECONDS

OLDEST_PYTHON = (3, 10)
SHOWN = ("torch", "deepspeed")  # the others are named only where they do not fit


def check_software(offload: bool) -> Iterator[Finding]:
    """offload: whether the DeepSpeed configuration steps on the host, with an operator that is built on first use."""
    yield check_python(sys.version_info[:3])
    yield from check_versions([Requirement(text) for text in metadata.requires("albef_ds") or ()])
    yield from check_optional()
    if not torch.cuda.is_available():
        yield check_allocator()
    yield from check_compilers(offload)
    yield from check_locks(extension_folders())


def check_python(version: tuple[int, int, int]) -> Finding:
    shown = f"{'.'.join(map(str, version))} ({platform.machine()}, {platform.system()})"
    if version[:2] < OLDEST_PYTHON:
        return problem("python", shown, f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or later")
    return ok("python", shown)


def check_versions(requirements: list[Requirement]) -> Iterator[Finding]:
    """What this package requires, by its own metadata; extras are optional.py's."""
    for wanted in requirements:
        if wanted.marker is not None and "extra" in str(wanted.marker):
            continue
        name = wanted.name
        advice = f"pip install '{name}{wanted.specifier}'"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield problem(name, "not installed", advice)
            continue
        # Its own builds (2.11.0+cu130) and release candidates count as what they are built from.
        if not wanted.specifier.contains(version.split("+")[0], prereleases=True):
            yield problem(name, f"{version}, asked for is {wanted.specifier}", advice)
        elif name in SHOWN:
            built = f", built for CUDA {torch.version.cuda}" if name == "torch" and torch.version.cuda else ""
            yield ok(name, f"{version}{built}")


def check_optional() -> Iterator[Finding]:
    """None of them is needed; one that is installed and cannot be used is worth a warning."""
    broken = {name for name in optional.PACKAGES if optional.find(name).version and not optional.find(name).available}
    for name, line in zip(optional.PACKAGES, optional.describe(), strict=True):
        text = line.removeprefix(name).strip()
        yield warning(name, text, optional.find(name).reason) if name in broken else ok(name, text)


def check_allocator() -> Finding:
    """`demo` and `downstream` load it by themselves; a launcher that is started by hand does not."""
    found = optional.tcmalloc()
    if found is None:
        return ok("tcmalloc", "a quicker malloc for CPU ranks: no: not installed (apt install libtcmalloc-minimal4)")
    loaded = "loaded" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else f"LD_PRELOAD={found} loads it"
    return ok("tcmalloc", f"a quicker malloc for CPU ranks: {found}, {loaded}")


def check_compilers(offload: bool) -> Iterator[Finding]:
    """Triton compiles its launchers with a C compiler, DeepSpeed its operators with a C++ one, ninja and, beside a GPU,
    nvcc."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    builds = offload or not torch.cuda.is_available()
    if compiler:
        yield ok("compiler", compiler)
    else:
        text = "no C++ compiler: Triton's kernels on a GPU, and DeepSpeed's operators on a CPU, are compiled when used"
        yield problem("compiler", text, "install gcc and g++ (build-essential), or set CC and CXX")
    first = shutil.which("ninja")
    beside = Path(sys.executable).with_name("ninja")
    if first or beside.is_file():
        found = {str(path): ninja_version(path) for path in (first, beside) if path and Path(path).is_file()}
        yield judge_ninja(found)
    else:
        text = "not found: DeepSpeed cannot build its operators"
        yield (problem if builds else warning)("ninja", text, "pip install ninja")
    if offload and torch.cuda.is_available():
        from torch.utils.cpp_extension import CUDA_HOME

        advice = f"install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME, or do not use offload_optimizer"
        if CUDA_HOME is None:
            yield problem("nvcc", "no CUDA toolkit: DeepSpeed builds its CPU Adam (offload_optimizer) with it", advice)
        else:
            yield ok("nvcc", f"CUDA toolkit in {CUDA_HOME}")


def ninja_version(path: str | Path) -> str:
    try:
        return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "that does not start"


def judge_ninja(versions: dict[str, str]) -> Finding:
    """versions: of the one that PATH gives and of the one beside this Python. 1.12 changed how built files are noted:
    an older one and a newer one build everything again after each other, at every start that finds the other's."""
    shown = ", ".join(f"{path} {version}" for path, version in versions.items())
    if len(set(versions.values())) <= 1:
        return ok("ninja", shown)
    text = f"{shown}: whichever comes second builds DeepSpeed's operators again"
    return warning("ninja", text, "put the folder of this Python first in PATH (activate the environment), everywhere")


def extension_folders() -> list[Path]:
    """Where PyTorch builds extensions: one folder each, under a folder a version or not."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted({lock.parent for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)})


def check_locks(folders: list[Path]) -> Iterator[Finding]:
    """A `lock` that a killed build left makes every later start wait for ever."""
    for folder in folders:
        lock = folder / "lock"
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # built meanwhile
            continue
        text = f"{lock}: there for {age:.0f} s"
        if age > FOREIGN_SECONDS:
            yield problem("build lock", f"{text}, longer than any build takes: runs would wait for it", f"rm {lock}")
        else:
            yield warning("build lock", text, "if nothing is being started just now, remove it")
