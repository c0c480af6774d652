"""Drivers, GPUs, cores and shared memory, judged on stand-ins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from albef_ds.doctor import hardware
from albef_ds.doctor.hardware import GIB, Gpu
from tests.doctor.told import states

A100 = Gpu(0, "NVIDIA A100-SXM4-80GB", 80 * GIB, 79 * GIB, (8, 0))
CODE = ["sm_75", "sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("built", "driver", "available", "wanted", "state"),
    [
        ("13.0", (13, 0), True, True, "ok"),
        ("12.8", (12, 4), True, True, "ok"),  # any driver of 12 serves any 12
        ("12.8", (13, 0), True, True, "ok"),
        ("13.0", (12, 8), False, True, "problem"),
        ("13.0", (13, 0), False, True, "problem"),  # it is there and cannot be used
        ("13.0", None, False, True, "warning"),
        ("13.0", None, False, False, "ok"),
        (None, (13, 0), False, True, "problem"),
        (None, None, False, False, "ok"),
    ],
)
def test_driver_and_torch(built, driver, available, wanted, state):
    found = hardware.check_driver(built, driver, available, wanted)
    assert found.state == state and bool(found.advice) == (state != "ok")


@pytest.mark.parametrize(
    ("change", "state", "named"),
    [
        ({}, "ok", "80.0 GiB, compute capability 8.0"),
        ({"capability": (8, 6)}, "ok", "8.6"),  # code of 8.0 runs on it
        ({"capability": (10, 0)}, "ok", "10.0"),  # compiled from PTX of 9.0
        ({"capability": (7, 0)}, "problem", "no code for it"),
        ({"capability": (7, 5)}, "warning", "no bf16"),
        ({"free": 60 * GIB}, "warning", "20.0 GiB are in use"),
        ({"ecc_errors": 0}, "ok", "A100"),
        ({"ecc_errors": 3}, "problem", "3 uncorrected ECC errors"),
    ],
)
def test_a_gpu(change, state, named):
    (found,) = hardware.check_gpus([replace(A100, **change)], CODE)
    assert found.state == state and named in found.text


def test_gpus_of_different_kinds_and_without_access_to_each_other():
    pair = [replace(A100, peers=(1,)), replace(A100, index=1, peers=(0,))]
    assert states(hardware.check_gpus(pair, CODE)) == ["ok", "ok", "ok"]
    found = list(hardware.check_gpus([A100, replace(A100, index=1, name="NVIDIA A30")], CODE))
    assert {f.subject for f in found if f.state == "warning"} == {"gpus", "peer access"}
    assert "0-1" in found[-1].text


def test_cores_shared_memory_and_open_files():
    assert hardware.check_cores(64, 8, 7).state == "ok"
    assert "data.workers=3" in hardware.check_cores(32, 8, 4).advice
    assert "data.workers=0" in hardware.check_cores(2, 8, 4).advice
    assert hardware.check_shm(64 * 2**20, 100 * 2**20, 1).state == "problem"
    assert hardware.check_shm(GIB, 100 * 2**20, 8).state == "ok"
    assert hardware.check_files((1024, 4096), 4).state == "ok"
    assert "ulimit -n 4096" in hardware.check_files((1024, 4096), 32).advice
    assert "ulimit -n 65536" in hardware.check_files((256, hardware.resource.RLIM_INFINITY), 0).advice
    assert hardware.check_files((hardware.resource.RLIM_INFINITY,) * 2, 32).state == "ok"
