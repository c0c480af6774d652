"""What the demo and `downstream` start the deepspeed launcher with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from albef_ds import demo, optional
from albef_ds.demo import environment


def test_every_launch_has_a_port_of_its_own(monkeypatch):
    commands = []
    monkeypatch.setattr(
        demo.subprocess, "run", lambda command, env: commands.append(command) or subprocess.CompletedProcess(command, 3)
    )
    assert {demo.launch("demo", ["train.max_steps=1"], ranks=2) for _ in range(2)} == {3}
    ports = [command[command.index("--master_port") + 1] for command in commands]
    assert ports[0] != ports[1] and all(1024 <= int(port) < 65536 for port in ports)
    assert all(command.index("--master_port") < command.index("--module") for command in commands)  # the launcher's own


def test_a_cpus_ranks_load_tcmalloc_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    library = optional.tcmalloc()
    maps = [sys.executable, "-c", "print(open('/proc/self/maps').read())"]
    loaded = subprocess.run(maps, env=environment(2), capture_output=True, text=True, check=True).stdout
    assert ("tcmalloc" in loaded) == (library is not None)


@pytest.mark.parametrize(
    ("library", "before", "after"),
    [
        ("libtcmalloc.so.4", None, "libtcmalloc.so.4"),
        ("libtcmalloc.so.4", "libother.so", "libother.so:libtcmalloc.so.4"),
        ("libtcmalloc.so.4", "libjemalloc.so.2", "libjemalloc.so.2"),  # the user's own choice
        (None, None, None),
        (None, "libother.so", "libother.so"),
    ],
)
def test_tcmalloc_beside_what_is_preloaded_already(monkeypatch, library, before, after):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(optional, "tcmalloc", lambda: library)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    if before:
        monkeypatch.setenv("LD_PRELOAD", before)
    assert environment(2).get("LD_PRELOAD") == after


def test_on_a_gpu_malloc_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(optional, "tcmalloc", lambda: "libtcmalloc.so.4")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "LD_PRELOAD" not in environment(2)
