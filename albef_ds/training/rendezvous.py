"""Where ranks find each other. On one machine nothing of it can be reached from another.

PyTorch's stores listen on every network interface, and whoever reaches one may read and change what ranks tell each
other. Where MASTER_ADDR is this machine's loopback address all ranks are here, and loopback is enough.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # tells PyTorch's rendezvous that a store is there already (torchrun's)
_served: dict[int, dist.TCPStore] = {}  # by port; a store ends with the last reference to it


def open_store(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    """A store that this process serves; port 0: any. Raises OSError where a port of loopback is taken."""
    address = loopback_address(host)
    options = {"is_master": True, "wait_for_workers": False, "timeout": timeout}
    if address is None:
        return dist.TCPStore(host, port, None, **options)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, port), family=family)
    port = listening.getsockname()[1]
    return dist.TCPStore(host, port, None, master_listen_fd=listening.detach(), **options)


@contextmanager
def on_loopback_alone(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Process groups that are made inside meet at MASTER_ADDR and MASTER_PORT as ever; where that is loopback, their
    store and Gloo's connections are there too. NCCL chooses its interface itself (NCCL_SOCKET_IFNAME)."""
    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", 0))
    if _AGENT_STORE in os.environ or not host or not port or loopback_address(host) is None:
        yield
        return
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if os.environ.get("RANK") != "0" or not _serve(host, port, timeout):
        yield
        return
    os.environ[_AGENT_STORE] = "True"
    try:
        yield
    finally:
        del os.environ[_AGENT_STORE]


def _serve(host: str, port: int, timeout: timedelta) -> bool:
    if port not in _served:
        try:
            _served[port] = open_store(host, port, timeout)
        except OSError:  # the port is taken: PyTorch says so itself, and with which address
            return False
    return True


def free_port() -> int:
    """A port that nothing on this machine listens on just now: two runs on one machine must not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def loopback_address(host: str) -> str | None:
    """The address of `host` where it is loopback; None where it is not, or is not known."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None
    return address if ipaddress.ip_address(address.split("%")[0]).is_loopback else None
