"""The hosts of a hostfile, and, started as the ranks of a run, what lies between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from albef_ds.doctor.finding import Finding, judged, ok, problem, warning

SSH = 22
PATIENCE = 5.0  # seconds for one connection
MESSAGE = 64 * 2**20  # bytes of the all-reduce that is timed
CLOCKS_APART = 1.0  # seconds; files' ages and logs are compared by hand, nothing in a run compares clocks
SLOW_LINK = 1e9  # bytes a second; 10 Gb/s Ethernet gives about as much
SLOW_ANSWER = 1e-3  # seconds of a tiny all-reduce
LAUNCHER_EXPORTS = ("NCCL", "PYTHON", "UCX", "MV2", "MLFLOW")  # DeepSpeed 0.19.8 passes on what begins so


# -- before a run ------------------------------------------------------------------------------------------------------


def read_hostfile(path: Path) -> tuple[dict[str, int], list[Finding]]:
    """The hosts and their slots."""
    from deepspeed.launcher.runner import fetch_hostfile

    if not path.is_file():
        return {}, [problem("hostfile", f"{path}: not there; the launcher would use this machine alone", "name it")]
    try:
        return dict(fetch_hostfile(str(path))), []
    except ValueError as error:
        return {}, [problem("hostfile", f"{path}: {error}", "a line a host: node1 slots=8")]


def check_hostfile(path: Path, port: int = SSH) -> tuple[dict[str, int], list[Finding]]:
    """Reads it, looks up every host and connects to its ssh."""
    hosts, findings = read_hostfile(path)
    if not hosts:
        return hosts, findings
    findings.append(ok("hostfile", f"{len(hosts)} hosts, {sum(hosts.values())} ranks"))
    if len(set(hosts.values())) > 1:
        findings.append(warning("hostfile", "hosts have different numbers of slots", "right only if their GPUs differ"))
    findings += [check_host_address(host, port) for host in hosts]
    if len(hosts) > 1:
        findings += check_launcher(shutil.which, os.environ)
    return hosts, findings


def check_host_address(host: str, port: int = SSH) -> Finding:
    try:
        addresses = sorted({info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        return problem("host", f"{host}: {error.strerror or error}", "add it to /etc/hosts or the name server")
    shown = f"{host} ({', '.join(addresses)})"
    if host != "localhost" and all(a.startswith("127.") or a == "::1" for a in addresses):
        advice = f"remove {host} from the 127.* lines of /etc/hosts: other hosts would be told that address"
        return problem("host", f"{shown}: a loopback address", advice)
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except OSError as error:
        text = f"{shown}: port {port}: {error.strerror or error}"
        return warning("host", text, "start sshd there and open the port, or launch with --no_ssh on every host")
    return ok("host", f"{shown}: port {port} answers")


def check_launcher(which: Callable[[str], str | None], env: Mapping[str, str]) -> Iterator[Finding]:
    """What `deepspeed --hostfile` needs on the machine it is started on."""
    missing = [program for program in ("ssh", "pdsh") if which(program) is None]
    if missing:
        text = f"{' and '.join(missing)} not found here; deepspeed --hostfile starts the other hosts with both"
        yield warning("launcher", text, "install them, or launch with --no_ssh on every host")
    else:
        yield ok("launcher", "ssh and pdsh found")
    kept = sorted(name for name in env if name.startswith(("GLOO_", "TORCH_", "OMP_")))
    if kept:
        text = f"{', '.join(kept)}: set here, but the launcher passes on only {'*, '.join(LAUNCHER_EXPORTS)}*"
        yield warning("launcher", text, "write them, a line NAME=value each, into ~/.deepspeed_env")


# -- between the ranks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes a second that each rank moves in a large all-reduce (NCCL's "bus bandwidth"); latency: seconds
    of a tiny one; right: whether the sums were."""

    bandwidth: float
    latency: float
    right: bool


@dataclass(frozen=True)
class Versions:
    python: str
    torch: str
    nccl: str
    deepspeed: str
    albef_ds: str


def launched() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def reach_master(seconds: float = 60.0) -> Finding | None:
    """Whether rank 0's port can be reached, within `seconds`; joining a group would wait for it for half an hour."""
    if os.environ["RANK"] == "0":
        return None  # it opens the port itself when it joins
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    deadline, why = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=PATIENCE).close()
            return None
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(0.5)
    advice = "check --master_addr, the firewall, and that rank 0 was started"
    return problem("network", f"{socket.gethostname()}: rank 0 at {address[0]}, port {address[1]}: {why}", advice)


def own_versions() -> Versions:
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "unused"
    names = ("torch", "deepspeed", "albef_ds")
    python = ".".join(sys.version.split()[0].split(".")[:2])
    found = {name: metadata.version(name) for name in names}
    return Versions(python=python, nccl=nccl, **found)


def check_between(rank: int, device: torch.device, output: Path | None) -> list[Finding]:
    """Collective. Findings on rank 0, none elsewhere."""
    world, host = dist.get_world_size(), socket.gethostname()
    group = dist.new_group(backend="gloo")  # checkpoints talk through one such too
    everyone: list = [None] * world
    dist.all_gather_object(everyone, (host, own_versions()), group=group)
    clocks = measure_clocks(rank, group)
    link = measure_link(device)
    unseen = None if output is None else hosts_without(output, rank, group)
    if rank != 0:
        return []
    findings = list(judge_versions(everyone))
    findings.append(judge_link(link, world, len({host for host, _ in everyone}), device.type))
    findings.append(judge_clocks({everyone[r][0]: apart for r, apart in clocks.items()}))
    if unseen is not None:
        findings.append(judge_output(output, unseen))
    return findings


def judge_versions(everyone: list[tuple[str, Versions]]) -> Iterator[Finding]:
    hosts = sorted({host for host, _ in everyone})
    yield ok("ranks", f"{len(everyone)} on {len(hosts)} hosts: {', '.join(hosts)}")
    for name in asdict(everyone[0][1]):
        of = {getattr(versions, name): host for host, versions in everyone}
        if len(of) > 1:
            shown = ", ".join(f"{version} on {host}" for version, host in sorted(of.items()))
            yield problem("versions", f"{name}: {shown}", "install the same everywhere, or use one environment for all")


def measure_link(device: torch.device, size: int = MESSAGE, rounds: int = 5) -> Link:
    """Times all-reduces over the default group: the median, after one that makes the connections."""
    world = dist.get_world_size()
    large, small = torch.ones(size // 4, device=device), torch.ones(1, device=device)

    def timed(tensor: torch.Tensor) -> float:
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])  # on a GPU: wait for it
        return time.perf_counter() - start

    timed(large)
    right = bool((large == world).all())
    seconds = statistics.median(timed(large.fill_(1)) for _ in range(rounds))
    timed(small)
    latency = statistics.median(timed(small.fill_(1)) for _ in range(4 * rounds))
    return Link(2 * (world - 1) / world * size / seconds, latency, right and float(small) == world)


def judge_link(link: Link, world: int, hosts: int, device: str) -> Finding:
    shown = (
        f"all-reduce of {MESSAGE >> 20} MiB over {world} ranks on {hosts} hosts: {link.bandwidth / 1e9:.2f} GB/s a "
        f"rank; of one number: {link.latency * 1e6:.0f} µs"
    )
    advice = "see NCCL_DEBUG=INFO for the way it takes, and ds_configs/README.md, Network"
    slow = device == "cuda" and (link.bandwidth < SLOW_LINK or link.latency > SLOW_ANSWER)
    return judged(
        (
            not link.right,
            problem("network", f"{shown}: wrong sums", "do not train on this, have it looked at"),
        ),
        (slow, warning("network", f"{shown}: slow", advice)),
        (True, ok("network", shown)),
    )


def measure_clocks(rank: int, group: dist.ProcessGroup, rounds: int = 5) -> dict[int, float]:
    """Seconds by which each other rank's clock is ahead of rank 0's; on rank 0. The quickest of several counts."""
    apart = {}
    for other in range(1, dist.get_world_size()):
        tries = []
        for _ in range(rounds if rank in (0, other) else 0):
            told = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                start = time.time()
                dist.send(told, other, group=group)
                dist.recv(told, other, group=group)
                end = time.time()
                tries.append((end - start, float(told) - (start + end) / 2))
            else:
                dist.recv(told, 0, group=group)
                dist.send(told.fill_(time.time()), 0, group=group)
        if rank == 0:
            apart[other] = min(tries)[1]
    return apart


def judge_clocks(apart: Mapping[str, float]) -> Finding:
    host, furthest = max(apart.items(), key=lambda item: abs(item[1]))
    shown = f"the furthest from rank 0's is {host}'s: {furthest * 1e3:+.0f} ms"
    if abs(furthest) <= CLOCKS_APART:
        return ok("clocks", shown)
    return warning("clocks", shown, "set them by NTP (chrony): logs and the ages of files mislead otherwise")


def hosts_without(output: Path, rank: int, group: dist.ProcessGroup) -> list[str]:
    """Collective. The hosts that do not see a folder which rank 0 makes where the run would write."""
    made: list = [None]
    if rank == 0:
        folder = output.absolute()
        while not folder.exists():
            folder = folder.parent
        with contextlib.suppress(OSError):  # then nobody sees it, and the check of the disk says why
            made[0] = tempfile.mkdtemp(prefix=".doctor_", dir=folder)
    dist.broadcast_object_list(made, src=0, group=group)
    seen: list = [None] * dist.get_world_size()
    there = made[0] is None or _appears(Path(made[0]))
    dist.all_gather_object(seen, (socket.gethostname(), there), group=group)
    if rank == 0 and made[0]:
        os.rmdir(made[0])
    return sorted({host for host, there in seen if not there})


def _appears(folder: Path, seconds: float = 3.0) -> bool:
    """A network file system may take a moment to show what another host made."""
    deadline = time.monotonic() + seconds
    while not folder.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return folder.exists()


def judge_output(output: Path, unseen: list[str]) -> Finding:
    if not unseen:
        return ok("output_dir", f"{output}: every host sees it")
    advice = "put output_dir on a file system that all hosts share: every rank writes its part of a checkpoint there"
    return problem("output_dir", f"{output}: {', '.join(unseen)} do not see what rank 0 writes there", advice)
