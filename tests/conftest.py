"""Options and settings of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports DeepSpeed or Triton: without a GPU the one must be told so, the other must interpret.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

torch.set_num_threads(1)  # two ranks on two cores; and sums are then made in one order
torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: cuDNN's convolutions take TF32 unless told otherwise


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, help="folder of recorded reference cases (default: tests/golden)")


@pytest.fixture(scope="session")
def golden(request) -> Path:
    from tests.golden_cases import GOLDEN

    return request.config.getoption("--golden") or GOLDEN
