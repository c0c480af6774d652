"""What gets installed: albef_ds with kernels/ inside it, and no top-level package `kernels`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("albef_ds", "kernels", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_kernels_inside_the_package_alone(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"albef_ds"}
    assert "albef_ds/kernels/__init__.py" in wheel


def test_the_wheel_holds_recipes_and_deepspeed_configurations(wheel):
    assert "albef_ds/configs/demo.yaml" in wheel
    assert "albef_ds/ds_configs/zero2_cpu.json" in wheel


def test_kernels_come_from_the_folder_of_that_name():
    spec = importlib.util.find_spec("albef_ds.kernels")
    assert Path(spec.origin).parent == ROOT / "kernels"
