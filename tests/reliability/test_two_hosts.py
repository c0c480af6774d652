"""Two machines, as far as the network goes: network namespaces with an address each, and a cable that can be pulled.

They share a disk, as the machines of a cluster share output_dir. Needs root and iproute2; skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from albef_ds.training.checkpoint_manifest import MANIFEST
from albef_ds.training.watchdog import EXIT_RANK_LOST
from tests.reliability.processes import ROOT, Ended, environment
from tests.reliability.test_faults import assert_equal_runs
from tests.training_run import write_recipe

pytestmark = pytest.mark.slow

NAMES = (f"albef{os.getpid()}a", f"albef{os.getpid()}b")
ADDRESSES = ("10.231.7.1", "10.231.7.2")
CARD = "cable"  # the network card of each
PORT = 29511  # free: nobody else lives in the namespaces
STEPS, EVERY = 200, 20


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("two hosts are made with ip (iproute2) and unshare (util-linux), which are not both here")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", CARD, "netns", NAMES[0], "type", "veth", "peer", "name", CARD, "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", CARD)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", CARD, "up")
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here (root is needed): {' '.join(error.cmd)}: {error.stderr}")
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, text=True, capture_output=True)


def start(host: int, command: Sequence[str], folder: Path, **settings: str) -> subprocess.Popen:
    """Starts a command on a host, under the host's own name; its output goes to output_HOST.txt."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host{host}"]
    env = {**environment(host, 2, PORT), "MASTER_ADDR": ADDRESSES[0], "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": CARD}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with open(folder / f"output_{host}.txt", "w") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[host], *named, *command],
            cwd=ROOT,
            env={**env, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def start_ranks(recipe: str, folder: Path) -> list[subprocess.Popen]:
    """One rank a host, told by its environment what a launcher would tell it."""
    command = [sys.executable, "-m", "albef_ds.train", recipe, "faults.dead_seconds=5"]
    return [start(host, command, folder) for host in (0, 1)]


def start_script(recipe: str, folder: Path) -> list[subprocess.Popen]:
    """The script that is started on every host where there is no ssh."""
    hostfile = folder / "hostfile"
    hostfile.write_text("host0 slots=1\nhost1 slots=1\n")
    command = [str(ROOT / "ds_configs" / "launch" / "no_ssh.sh"), str(hostfile), recipe, "faults.dead_seconds=5"]
    nodes = [{"NODE": str(host), "MASTER": ADDRESSES[0], "PORT": str(PORT)} for host in (0, 1)]
    return [start(host, command, folder, **node) for host, node in enumerate(nodes)]


def ended(processes: list[subprocess.Popen], folder: Path, seconds: float = 280) -> Ended:
    """Waits for both; what is still there then is killed with all that it has started."""
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    codes = [p.poll() for p in processes]
    kill(processes)
    logs = [folder / f"output_{host}.txt" for host in (0, 1)]
    return Ended(codes, [log.read_text(errors="replace") if log.exists() else "" for log in logs])


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


@pytest.mark.timeout(1200)
def test_a_host_that_is_cut_off_ends_the_run_on_both_and_the_run_goes_on_bitwise(hosts, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sections = {"train": {"max_steps": STEPS}, "checkpoint": {"every": EVERY, "keep": 2}}
    for folder in (whole, cut):
        folder.mkdir()
    recipe, cut_recipe = (str(write_recipe(folder, **sections)) for folder in (whole, cut))
    undisturbed = ended(start_script(recipe, whole), whole)
    assert undisturbed.codes == [0, 0], undisturbed

    processes = start_ranks(cut_recipe, cut)
    try:
        wait_for_steps(cut, EVERY + 5, processes)
        ip("-n", NAMES[1], "link", "set", CARD, "down")
        result = ended(processes, cut, 120)
    finally:
        kill(processes)
        ip("-n", NAMES[1], "link", "set", CARD, "up")
    assert result.codes == [EXIT_RANK_LOST, EXIT_RANK_LOST], result
    for rank in (0, 1):
        assert f"rank {rank} ends: rank {1 - rank} (host{1 - rank}, process" in result.outputs[rank], result
        assert "is lost: no sign of life" in result.outputs[rank], result

    assert (cut / "run" / "checkpoints" / f"step_{EVERY:08d}" / MANIFEST).exists()
    assert not (cut / "run" / "albef.pth").exists()  # it was cut off before its end
    resumed = ended(start_script(cut_recipe, cut), cut)
    assert resumed.codes == [0, 0], resumed
    assert "resumed from" in resumed.outputs[0], resumed
    assert_equal_runs(whole, cut, STEPS)


def wait_for_steps(folder: Path, steps: int, processes: list[subprocess.Popen], seconds: float = 200) -> None:
    written = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not (written.exists() and written.read_text().count("\n") >= steps):
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, ended(processes, folder, 0)
        time.sleep(0.05)


def test_the_doctor_measures_what_lies_between_the_hosts(hosts, tmp_path):
    recipe = str(write_recipe(tmp_path))
    command = [sys.executable, "-m", "albef_ds", "doctor", recipe]
    found = ended([start(host, command, tmp_path) for host in (0, 1)], tmp_path)
    assert found.codes == [0, 0], found
    told = found.outputs[0]
    assert "2 on 2 hosts: host0, host1" in told and "over 2 ranks on 2 hosts" in told, found
    assert "every host sees it" in told and "x 2 ranks" in told, found


def test_the_doctor_says_that_rank_0_cannot_be_reached(hosts, tmp_path):
    recipe = str(write_recipe(tmp_path))
    command = [sys.executable, "-m", "albef_ds", "doctor", recipe]
    found = ended([start(1, command, tmp_path)], tmp_path)  # nobody starts rank 0
    assert found.codes == [1] and f"rank 0 at {ADDRESSES[0]}, port {PORT}" in found.outputs[1], found
