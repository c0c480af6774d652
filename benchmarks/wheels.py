"""Starts this project's commands on a machine that has torch and no package registry: wheels from a folder.

The wheels go into a folder of their own, beside a file that Python reads at its start and that shows it this checkout's
`kernels/` under its installed name. Nothing of the machine's own packages is changed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import ROOT

MAPPED = {"albef_ds.kernels": "kernels"}  # as setup.py's package_dir has it
NEEDED = ("albef_ds.train", "timm", "transformers", "tensorboard", "matplotlib", "pytest", "hypothesis", "scipy")
STARTED_BY_PYTHON = '''"""Shows Python the folders of a checkout that an installation would map."""

import importlib.util
import sys

FOLDERS = {folders!r}


class Checkout:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in FOLDERS:
            return None
        folder = FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder + "/__init__.py", submodule_search_locations=[folder]
        )


sys.meta_path.insert(0, Checkout)
'''


class WheelsError(RuntimeError):
    """The wheels cannot be installed, or something that no lane can do without is still missing; says what to do."""


def environment(wheels: Path | None, site: Path) -> dict[str, str]:
    """Environment variables of processes that run this checkout's code.

    Args:
        wheels: folder of wheels to install into `site`; None: what is installed is enough, `kernels/` apart.
        site: a folder of its own, made anew by each call that gives wheels.

    Raises:
        WheelsError: no wheel in the folder, pip refuses one of them, or a package is still missing.
    """
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if wheels is not None:
        install(wheels, site)
    if wheels is not None or importlib.util.find_spec("albef_ds.kernels") is None:
        site.mkdir(parents=True, exist_ok=True)
        folders = {name: str(ROOT / folder) for name, folder in MAPPED.items()}
        (site / "sitecustomize.py").write_text(STARTED_BY_PYTHON.format(folders=folders))
        variables["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if missing := not_importable(NEEDED, variables):
        raise WheelsError(
            f"this Python ({sys.executable}) cannot import {'; '.join(missing)}. Install the project (make install), "
            "or where there is no registry put wheels for what is missing into a folder and give it as --wheels"
        )
    return variables


def install(wheels: Path, site: Path) -> None:
    """All wheels of the folder, without what they depend on, into `site`."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise WheelsError(f"{wheels}: no *.whl in this folder")
    shutil.rmtree(site, ignore_errors=True)
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise WheelsError(f"{wheels}: pip does not install these wheels for {sys.executable}: {said[-1]}")


def not_importable(modules: tuple[str, ...], variables: dict[str, str]) -> list[str]:
    """Those that a process with these variables cannot import, each with the reason: what is there may lack another."""
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: importlib.import_module(name)\n"
        "    except Exception as error: print(f'MISSING {name} ({error})')\n"
    )
    command = [sys.executable, "-c", code, *modules]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, cwd=ROOT)
    return [line.removeprefix("MISSING ") for line in done.stdout.splitlines() if line.startswith("MISSING ")]
