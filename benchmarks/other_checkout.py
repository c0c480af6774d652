"""Runs a module of this checkout's benchmarks on the albef_ds of another one, such as a `git worktree` of its past.

    python -m benchmarks.other_checkout FOLDER benchmarks.host_step ARGUMENTS

Neither the installed albef_ds nor that of the current folder is looked at: what FOLDER lacks is missing.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from benchmarks.wheels import MAPPED

PACKAGE = "albef_ds"
FOLDERS = {PACKAGE: PACKAGE, **MAPPED}  # of a checkout, by the name under which they are imported


def missing(folder: Path) -> str | None:
    """What a folder lacks to be a checkout, None if nothing."""
    files = (folder / path / "__init__.py" for path in FOLDERS.values())
    return next((f"{file} is missing" for file in files if not file.is_file()), None)


class Finder:
    """Finds albef_ds and all below it in one checkout alone. First in sys.meta_path."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None = None, target=None) -> ModuleSpec | None:
        """Raises ModuleNotFoundError for a part of albef_ds that the checkout lacks: a finder asked after this one
        would come with another checkout's."""
        if name.split(".")[0] != PACKAGE:
            return None
        if name in FOLDERS:
            place = self.folder / FOLDERS[name]
            options = {"submodule_search_locations": [str(place)]}
            return importlib.util.spec_from_file_location(name, place / "__init__.py", **options)
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            raise ModuleNotFoundError(f"{self.folder} has no module {name}", name=name)
        return spec


def imported(folder: Path) -> list[str]:
    """The folders that albef_ds and albef_ds.kernels were imported from.

    Raises:
        RuntimeError: a module of albef_ds does not lie in `folder`.
    """
    files = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}
    strangers = [file for file in files.values() if file and not Path(file).is_relative_to(folder)]
    if strangers:
        raise RuntimeError(f"asked for the checkout {folder}, Python imported {', '.join(strangers)}")
    return [str(Path(files[name]).parent) for name in FOLDERS if name in files]


def main() -> None:
    """The command line in this file's head."""
    folder, module, *arguments = sys.argv[1:]
    sys.meta_path.insert(0, Finder(Path(folder).resolve()))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
