"""A machine that claims to have an NVIDIA GPU: whole training steps run on it within seconds, on any CPU.

    from benchmarks import fake_gpu
    mode = fake_gpu.install()           # before torch is imported
    task = fake_gpu.to_gpu(task)        # parameters and buffers, in place
    batch = fake_gpu.move(batch)
    with mode, torch.autocast("cuda", torch.bfloat16): task(batch)

Tensors are those of PyTorch's FakeTensorMode: they have a device, a dtype and a shape, and no values.

What is real: which devices, dtypes and shapes an operator accepts; autograd, autocast, and what torch.compile captures;
which kernel scaled_dot_product_attention chooses for the compute capability; flash-attn's own Python, down to the
operators that its compiled part would follow. A read by the host (.item(), bool(), nonzero, a boolean index), which
would make it wait for the GPU, is an error.

What is not: numbers, times, memory, streams and events (all is done at once), NCCL, how cuDNN convolves, and
what compiled kernels check by themselves: tests/rehearsal/strict.py says these checks again, and refuses copies that
wait. Nothing is computed: Triton's kernels and flash-attn's are never launched.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from albef_ds.data.batch import Movable

    Batch = TypeVar("Batch", bound=Movable)

SOURCE = Path(__file__).with_suffix(".cpp")
FLASH_ATTN = Path(sys.prefix, "flash-attn")  # where make puts its Python alone, out of the environment's own packages


@dataclass(frozen=True)
class Properties:
    """As torch.cuda.get_device_properties has them."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int  # bytes
    shared_memory_per_block_optin: int  # bytes
    L2_cache_size: int  # bytes
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    warp_size: int = 32
    gcnArchName: str = ""


GPUS = {
    (8, 0): Properties("NVIDIA A100-SXM4-80GB", 8, 0, 108, 80 << 30, 163 << 10, 40 << 20),
    (9, 0): Properties("NVIDIA H100 80GB HBM3", 9, 0, 132, 80 << 30, 227 << 10, 50 << 20),
}
_installed: FakeTensorMode | None = None


def install(capability: tuple[int, int] = (9, 0), flash: bool = True) -> FakeTensorMode:
    """Makes this process a machine with one GPU, for as long as it lives: PyTorch is changed globally.

    Args:
        capability: the GPU's, one of GPUS.
        flash: whether flash-attn is installed on the machine.

    Returns:
        The mode to enter; the same one on every call.

    Raises:
        RuntimeError: torch was imported before, has no CUDA in it, or something that this needs is missing; says what.
    """
    global _installed
    if _installed is not None:
        return _installed
    if "torch" in sys.modules:
        raise RuntimeError("fake_gpu.install() must come before torch is imported: PyTorch looks for the driver once")
    apart = (FLASH_ATTN / "flash_attn").is_dir()
    if flash and not apart and importlib.util.find_spec("flash_attn") is None:
        raise RuntimeError(f"flash-attn is not installed, nor is its Python at {FLASH_ATTN}: run `make -B install`")
    driver = _load_driver()
    import torch
    from torch._subclasses import fake_tensor

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} was built without CUDA: its CUDA build is needed, though no GPU")
    gpu = GPUS[capability]
    torch._C._ensureCUDADeviceGuardSet()
    shared_memory = gpu.shared_memory_per_block_optin
    driver.fake_gpu(gpu.name.encode(), gpu.major, gpu.minor, gpu.multi_processor_count, shared_memory)
    _answer_for_cuda(torch, gpu)
    fake_tensor.init_gpu_context = lambda device: None
    # As where there is no GPU: torch.tensor(..., device="cuda") then makes its tensor on the host and copies it, which
    # is what it does on a GPU too, and what whoever counts copies must see.
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)
    if flash:
        sys.path[:0] = [str(FLASH_ATTN)] if apart else []
        sys.modules["flash_attn_2_cuda"] = types.ModuleType("flash_attn_2_cuda")
    else:
        sys.modules["flash_attn"] = None
    _installed = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)  # real tensors are the host's
    return _installed


def move(batch: Batch) -> Batch:
    """A batch on the host to one of the same shapes on the GPU, as a loader hands it over: no copy is counted."""
    return batch._map(_on_the_gpu)


def to_gpu(module: nn.Module) -> nn.Module:
    """Puts every parameter and buffer of `module` on the GPU, in place; shared ones stay shared, gradients are lost."""
    from torch import nn

    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old ones, so that their ids stay theirs
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = _on_the_gpu(old)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new, old
                tensors[name] = made[id(old)][0]
    return module


@contextmanager
def without_flash_attn() -> Iterator[None]:
    """The same machine, flash-attn not installed."""
    from albef_ds import optional
    from albef_ds.model.attention import resolve_backend

    def forget() -> None:
        optional.find.cache_clear()
        resolve_backend.cache_clear()

    try:
        with mock.patch.dict(sys.modules, {"flash_attn": None}):
            forget()
            yield
    finally:
        forget()


def _on_the_gpu(tensor: Tensor) -> Tensor:
    import torch

    assert _installed is not None, "call install() first"
    with _installed:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def _pin_memory(tensor: Tensor, device: object = None) -> Tensor:
    pinned = tensor.clone()
    pinned.in_pinned_memory = True
    return pinned


def _is_pinned(tensor: Tensor, device: object = None) -> bool:
    whole = tensor if tensor._base is None else tensor._base
    return getattr(whole, "in_pinned_memory", False)


class _Stream:
    """The only stream there is, on which everything is done already."""

    cuda_stream = 0
    query = staticmethod(lambda: True)
    synchronize = wait_stream = wait_event = lambda self, *_: None

    def __init__(self, *_, **__) -> None:
        pass

    def record_event(self, event=None):
        return event or _Event()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


class _Event:
    query = staticmethod(lambda: True)
    record = wait = synchronize = lambda self, *_: None

    def __init__(self, *_, **__) -> None:
        pass


def _answer_for_cuda(torch, gpu: Properties) -> None:
    """Puts in place what torch.cuda would ask the driver or cuDNN for."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (gpu.major, gpu.minor),
        "get_device_properties": gpu,
        "get_device_name": gpu.name,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "mem_get_info": (gpu.total_memory, gpu.total_memory),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        **dict.fromkeys(("current_stream", "default_stream"), _Stream()),
        **dict.fromkeys(("_lazy_init", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats")),
        **dict.fromkeys(("set_device", "set_rng_state", "synchronize")),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.stream = _Stream, _Event, lambda stream: _Stream()
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = _pin_memory, _is_pinned
    torch.Tensor.record_stream = lambda self, stream: None
    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn
    torch._C._conv_determine_backend_memory_format = lambda *_, **__: torch.contiguous_format


def _load_driver() -> ctypes.CDLL:
    """Loads fake_gpu.cpp, compiled once for every torch and every change of it."""
    packages = Path(metadata.distribution("torch").locate_file(""))
    key = hashlib.sha256(SOURCE.read_bytes() + metadata.version("torch").encode()).hexdigest()[:16]
    cache = os.environ.get("ALBEF_DS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "albef_ds")
    library = Path(cache).expanduser() / f"fake_gpu-{key}.so"
    if not library.exists():
        _compile(packages, library)
    # Global, and before torch's own libraries: theirs then take these answers in place of those they bring.
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compile(packages: Path, library: Path) -> None:
    headers = sorted(packages.glob("nvidia/*/include/driver_types.h"))
    if not headers:
        raise RuntimeError(f"no CUDA headers in {packages / 'nvidia'}: torch's wheel for CUDA brings them")
    # Triton's copy fills in crt/host_defines.h, which the wheel of the runtime leaves out; it comes last, being older.
    folders = [headers[-1].parent, packages / "triton/backends/nvidia/include"]
    compilers = filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++"))
    compiler = next(filter(shutil.which, compilers), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler: install g++, or set CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command += [*(f"-I{folder}" for folder in folders), str(SOURCE), "-o", str(unfinished)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{SOURCE} does not compile: {' '.join(command)}\n{error.stderr}") from None
    unfinished.replace(library)  # at once: others may be at it too
