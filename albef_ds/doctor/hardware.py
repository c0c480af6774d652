"""What the machine is: GPUs and driver, cores, shared memory, open files.

What a GPU says is read into `Gpu` first, so that the judging is tested without one.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from albef_ds.doctor.finding import Finding, judged, ok, problem, warning

GIB = 2**30
FIRST_WITH_BF16 = (8, 0)  # Ampere
PREFETCH = 2  # batches that each loader worker prepares ahead
FILES_OF_A_RANK = 512  # libraries, sockets to other ranks, checkpoints: generous
NCCL_SHM = 2**28  # of /dev/shm, what NCCL and gloo may want: generous


@dataclass(frozen=True)
class Gpu:
    """index: within CUDA_VISIBLE_DEVICES. memory, free: bytes. ecc_errors: uncorrected since the driver was loaded;
    None: not said. peers: the GPUs whose memory it reads directly."""

    index: int
    name: str
    memory: int
    free: int
    capability: tuple[int, int]
    peers: tuple[int, ...] = ()
    ecc_errors: int | None = None


def found_gpus() -> list[Gpu]:
    """The GPUs that PyTorch may use; makes a CUDA context on each."""
    if not torch.cuda.is_available():
        return []
    count, errors = torch.cuda.device_count(), _ecc_errors()
    gpus = []
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        peers = tuple(j for j in range(count) if j != i and torch.cuda.can_device_access_peer(i, j))
        free = torch.cuda.mem_get_info(i)[0]
        uuid = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else ""
        gpus.append(
            Gpu(
                i,
                properties.name,
                properties.total_memory,
                free,
                (properties.major, properties.minor),
                peers,
                errors.get(uuid),
            )
        )
    return gpus


def _ecc_errors() -> dict[str, int]:
    """Uncorrected errors by the GPU's UUID, as far as nvidia-smi says."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=uuid,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = [[part.strip() for part in line.split(",")] for line in lines]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}  # "[N/A]": no ECC


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver serves; None without a driver."""
    try:
        library, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return None
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def check_driver(built: str | None, driver: tuple[int, int] | None, available: bool, wanted: bool) -> Finding:
    """built: the CUDA that torch is built for ("13.0"). wanted: whether the run is to be on a GPU."""
    if built is None:
        text = "this torch is built without CUDA"
        return problem("cuda", text, "install torch for your CUDA, see pytorch.org") if wanted else ok("cuda", text)
    if driver is None:
        text = f"no NVIDIA driver (libcuda.so.1), torch is built for CUDA {built}"
        advice = "install the driver, in a container start it with --gpus all; or choose train.deepspeed=zero2_cpu"
        return warning("cuda", text, advice) if wanted else ok("cuda", text)
    shown = f"driver serves CUDA {driver[0]}.{driver[1]}, torch is built for {built}"
    if driver[0] < int(built.split(".")[0]):  # within a major version any driver serves any toolkit
        return problem("cuda", shown, f"update the driver, or install torch built for CUDA {driver[0]}")
    if not available:
        advice = "see nvidia-smi, CUDA_VISIBLE_DEVICES and the rights of /dev/nvidia*; the driver may want a restart"
        return problem("cuda", f"{shown}, but torch cannot use the GPU", advice)
    return ok("cuda", shown)


def check_gpus(gpus: Sequence[Gpu], architectures: Sequence[str]) -> Iterator[Finding]:
    """architectures: what torch has code for, as torch.cuda.get_arch_list() says."""
    for gpu in gpus:
        major, minor = gpu.capability
        shown = f"{gpu.name}, {gpu.memory / GIB:.1f} GiB, compute capability {major}.{minor}"
        used = gpu.memory - gpu.free
        yield judged(
            (
                not _has_code_for(gpu.capability, architectures),
                problem("gpu", f"{gpu.index}: {shown}: torch has no code for it", "install a torch that names it"),
            ),
            (
                bool(gpu.ecc_errors),
                problem(
                    "gpu",
                    f"{gpu.index}: {shown}: {gpu.ecc_errors} uncorrected ECC errors",
                    "drain the machine, restart it and have the card looked at: such errors spoil results",
                ),
            ),
            (
                used > 0.1 * gpu.memory,
                warning(
                    "gpu",
                    f"{gpu.index}: {shown}: {used / GIB:.1f} GiB are in use already",
                    "see nvidia-smi for whose they are; a killed run may have left processes",
                ),
            ),
            (
                gpu.capability < FIRST_WITH_BF16,
                warning(
                    "gpu",
                    f"{gpu.index}: {shown}: no bf16 matrix units",
                    "torch_autocast in bf16 is slow on it: use a DeepSpeed configuration without it",
                ),
            ),
            (True, ok("gpu", f"{gpu.index}: {shown}")),
        )
    if len({gpu.name for gpu in gpus}) > 1:
        advice = "every rank waits for the slowest: choose equal ones with --include or CUDA_VISIBLE_DEVICES"
        yield warning("gpus", f"of different kinds: {', '.join(sorted({gpu.name for gpu in gpus}))}", advice)
    if len(gpus) > 1:
        apart = [f"{a.index}-{b.index}" for a in gpus for b in gpus if a.index < b.index and b.index not in a.peers]
        if apart:
            text = f"no direct access between GPUs {', '.join(apart[:4])}{' …' if len(apart) > 4 else ''}"
            advice = "they talk through host memory: see nvidia-smi topo -m; PCIe ACS or an IOMMU may forbid it"
            yield warning("peer access", text, advice)
        else:
            yield ok("peer access", f"each of the {len(gpus)} GPUs reads the others' memory")


def _has_code_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code of the same major version runs; PTX (compute_*) of any older one is compiled for it."""
    if not architectures:
        return True  # not said
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = "".join(c for c in digits if c.isdigit())  # sm_90a
        known = (int(number[:-1]), int(number[-1]))
        if known <= capability and (kind == "compute" or known[0] == capability[0]):
            return True
    return False


def check_nccl() -> Finding:
    try:
        return ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    except (AttributeError, RuntimeError, ImportError):
        return problem("nccl", "this torch has no NCCL", "install a torch for Linux with CUDA")


def check_host(ranks: int, workers: int, micro_batch: int, image_size: int) -> Iterator[Finding]:
    """ranks: processes on this machine; workers: loader processes of each."""
    yield check_cores(len(os.sched_getaffinity(0)), ranks, workers)
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE), workers)
    batches = ranks * workers * PREFETCH * micro_batch * 3 * image_size**2 * 4
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        advice = "mount a tmpfs there: loader workers hand over their batches through it"
        yield problem("/dev/shm", "not there", advice) if workers else warning("/dev/shm", "not there", advice)
        return
    yield check_shm(usage.free, batches, ranks)


def check_cores(cores: int, ranks: int, workers: int) -> Finding:
    processes = ranks * (1 + workers)
    shown = f"{cores} for {ranks} ranks with {workers} loader workers each"
    if processes <= cores:
        return ok("cores", shown)
    fitting = max(0, cores // ranks - 1)
    return warning("cores", f"{shown}: {processes} processes", f"data.workers={fitting}, unless a measurement objects")


def check_files(limit: tuple[int, int], workers: int) -> Finding:
    soft, hard = limit
    needed = FILES_OF_A_RANK + 64 * workers * PREFETCH  # a worker's tensors travel as open files
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ok("open files", f"at most {soft}" if soft != resource.RLIM_INFINITY else "no limit")
    raised = "ulimit -n 65536" if hard == resource.RLIM_INFINITY or hard >= 65536 else f"ulimit -n {hard}"
    advice = f"{raised} before the start (SLURM: --propagate=NOFILE; systemd: LimitNOFILE)"
    return warning("open files", f"at most {soft}, {needed} may be wanted", advice)


def check_shm(free: int, batches: int, ranks: int) -> Finding:
    """free: bytes of /dev/shm; batches: what loader workers hold there."""
    needed = batches + (NCCL_SHM if ranks > 1 else 0)
    shown = f"{free / 2**20:,.0f} MiB free, up to {needed / 2**20:,.0f} MiB wanted"
    if free >= needed:
        return ok("/dev/shm", shown)
    advice = "Docker: --shm-size=16g or --ipc=host; Kubernetes: an emptyDir of medium Memory; or lower data.workers"
    return problem("/dev/shm", f"{shown}: loader workers would die of a bus error", advice)
