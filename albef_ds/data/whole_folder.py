"""Folders made in one go from a few arguments: complete or not there, and never taken for what others would give."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def whole_folder(root: Path, is_written: Callable[[], bool]) -> Iterator[Path]:
    """Yields the path of a folder to make and fill; at the end it becomes `root`, or vanishes where an error is raised.

    Several processes may want the same folder at once: each writes its own, the first to finish gives its name, and
    for the others `is_written` says whether that one is as good.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = root.parent / f".{root.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        yield temporary
        try:
            os.rename(temporary, root)
        except OSError:
            if not is_written():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_made_from(meta: Path, arguments: Mapping, what: str, beside: tuple[str, ...] = ()) -> bool:
    """Whether the folder of `meta`, a JSON object of what it was made from, is there and was made from `arguments`.

    Args:
        what: the folder is expected to hold.
        beside: keys of the object that are no arguments.

    Raises:
        FileExistsError: the folder holds something else; names what differs.
    """
    root = meta.parent
    try:
        found = json.loads(meta.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict):
        kept = {name: value for name, value in found.items() if name not in beside}
        differing = [*_differences(kept, arguments)]
    else:
        differing = [f"{meta.name} is missing or cannot be read"]
    if not differing:
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} holds something else than {what}: {'; '.join(differing)}; delete it or choose another folder"
        )
    return False


def _differences(found: Mapping, wanted: Mapping, within: str = "") -> Iterator[str]:
    for name in {**wanted, **found}:
        there, here = found.get(name, "nothing"), wanted.get(name, "nothing")
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _differences(there, here, f"{within}{name}.")
        elif there != here:
            yield f"{within}{name} is {_brief(there)} there, {_brief(here)} is wanted"


def _brief(value: object) -> str:
    return str(dict(value) if isinstance(value, Mapping) else value)[:120]
