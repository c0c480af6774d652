"""What was freed between blocks in use goes back to the system."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from albef_ds.training.host_memory import give_back

BLOCK, BLOCKS = 100_000, 2_000  # bytes: small enough that glibc takes it from its heap


def resident() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) << 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library gives back in its own way")
def test_freed_blocks_between_blocks_in_use_are_given_back():
    blocks = [bytes(b"x" * BLOCK) for _ in range(BLOCKS)]
    full = resident()
    kept = blocks[::20]  # holes, not one free end
    del blocks
    assert full - resident() < BLOCK * BLOCKS // 2, "glibc has given back by itself: this shows nothing"
    give_back()
    assert full - resident() > BLOCK * BLOCKS * 0.8
    assert len(kept) == BLOCKS // 20
