"""A machine without a package registry: wheels from a folder, this checkout's kernels under their installed name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import dry_run, wheels

NAMES = ("made_up_for_this_test", "albef_ds.kernels")


def write_wheel(folder: Path, tag: str = "py3-none-any") -> Path:
    """A package of one line."""
    path = folder / f"{NAMES[0]}-1.0-{tag}.whl"
    info = f"{NAMES[0]}-1.0.dist-info"
    files = {
        f"{NAMES[0]}/__init__.py": "HERE = 1\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAMES[0]}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def imported(code: str, variables: dict[str, str], folder: Path) -> str:
    """What a process without this environment's own packages prints."""
    command = [sys.executable, "-S", "-c", "import sitecustomize\n" + code]  # -S: neither site-packages nor its mapping
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)
    return done.stdout + done.stderr[-300:]


def test_wheels_and_kernels_are_found_by_processes_that_are_given_the_variables(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels")
    monkeypatch.setattr(wheels, "NEEDED", (NAMES[0],))
    variables = wheels.environment(tmp_path / "wheels", tmp_path / "site")
    # Only looked for: importing it wants torch.
    code = f"import importlib.util as u, {NAMES[0]} as m\nprint(m.HERE, u.find_spec('{NAMES[1]}').origin)"
    assert imported(code, variables, tmp_path).split() == ["1", str(wheels.ROOT / "kernels" / "__init__.py")]
    assert not (set(os.environ) - set(variables))  # what the machine has set stays


def test_what_cannot_be_installed_or_imported_is_named(tmp_path, monkeypatch):
    with pytest.raises(wheels.WheelsError, match="no .*whl in this folder"):
        wheels.environment(tmp_path, tmp_path / "site")
    path = write_wheel(tmp_path, tag="cp27-none-any")
    with pytest.raises(wheels.WheelsError, match=f"does not install these wheels for .*{path.name}"):
        wheels.environment(tmp_path, tmp_path / "site")
    monkeypatch.setattr(wheels, "NEEDED", ("json", NAMES[0]))
    with pytest.raises(wheels.WheelsError, match=f"cannot import {NAMES[0]} .No module named.*--wheels"):
        wheels.environment(None, tmp_path / "site")


def test_a_dry_runs_account_is_read_line_by_line():
    text = "batch:       4 samples\npeak memory: 6.43 GiB of the process\nsomething else\n"
    assert dry_run.figures(text) == {"batch": "4 samples", "peak memory": "6.43 GiB of the process"}
