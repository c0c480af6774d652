"""Hosts, links and the launcher's settings, judged on stand-ins."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from albef_ds.doctor import network
from albef_ds.doctor.network import Link, Versions
from tests.doctor.told import of, states


def test_a_hostfile(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# two\nlocalhost slots=2\nno-such-host.invalid slots=1\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hosts, findings = network.check_hostfile(file, port)
        assert network.check_host_address("localhost", port).state == "ok"
    assert hosts == {"localhost": 2, "no-such-host.invalid": 1}
    found = of(findings, "host")
    assert states(found) == ["ok", "problem"] and "no-such-host.invalid" in found[1].text
    assert "different numbers of slots" in of(findings, "hostfile")[1].text
    assert network.check_host_address("localhost", port).state == "warning"  # nobody listens any more


@pytest.mark.parametrize("text", ["node1 slots=eight\n", "node1\n", "node1 slots=1\nnode1 slots=1\n", ""])
def test_a_hostfile_that_is_none(tmp_path, text):
    (tmp_path / "hostfile").write_text(text)
    assert states(network.read_hostfile(tmp_path / "hostfile")[1]) == ["problem"]
    assert states(network.read_hostfile(tmp_path / "nowhere")[1]) == ["problem"]


def test_a_host_that_calls_itself_by_a_loopback_address(monkeypatch):
    """As Debian's installer writes it into /etc/hosts."""
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.1.1", 22))])
    found = network.check_host_address("node1")
    assert found.state == "problem" and "/etc/hosts" in found.advice


def test_settings_that_the_launcher_would_not_pass_on():
    env = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "HOME": "/root"}
    launcher, settings = network.check_launcher(lambda name: f"/usr/bin/{name}", env)
    assert launcher.state == "ok"
    assert settings.text.startswith("GLOO_SOCKET_IFNAME, TORCH_NCCL_DUMP_ON_TIMEOUT: ")
    (missing,) = network.check_launcher(lambda name: None if name == "pdsh" else name, {})
    assert missing.state == "warning" and "pdsh" in missing.text and "--no_ssh" in missing.advice


def test_links_clocks_versions_and_the_shared_folder_are_judged():
    fast, slow = Link(20e9, 30e-6, True), Link(0.1e9, 5e-3, True)
    assert network.judge_link(fast, 16, 2, "cuda").state == "ok"
    assert network.judge_link(slow, 16, 2, "cuda").state == "warning"
    assert network.judge_link(slow, 2, 1, "cpu").state == "ok"  # gloo is no faster
    assert network.judge_link(replace(fast, right=False), 16, 2, "cuda").state == "problem"
    assert network.judge_clocks({"a": 0.01, "b": -0.2}).state == "ok"
    behind = network.judge_clocks({"a": 0.01, "b": -7.0})
    assert behind.state == "warning" and "b's: -7000 ms" in behind.text
    one = Versions("3.11", "2.11.0", "2.28.9", "0.19.8", "0.1.0")
    assert states(network.judge_versions([("a", one), ("b", one)])) == ["ok"]
    found = list(network.judge_versions([("a", one), ("b", replace(one, nccl="2.21.5"))]))
    assert states(found) == ["ok", "problem"] and "2.21.5 on b" in found[1].text
    assert network.judge_output(Path("run"), []).state == "ok"
    assert "b do not see" in network.judge_output(Path("run"), ["b"]).text


def test_a_master_that_nobody_reaches(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for key, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(key, value)
        assert network.reach_master(1) is None
    found = network.reach_master(0.1)
    assert found.state == "problem" and f"port {port}" in found.text
