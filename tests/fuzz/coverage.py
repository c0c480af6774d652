"""Which lines of the readers a corpus reaches, counted without any other package."""

from __future__ import annotations

import importlib
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import CodeType

from tests.fuzz.targets import run

READERS = {
    "annotations": ("data.annotations", "data.task_entries", "data.refcoco", "data.pack_sources"),
    "shards": ("data.shards", "data.shard_folder", "data.shard_format", "data.shard_check", "data.images"),
    "checkpoints": ("training.checkpoint_manifest", "training.checkpoint_files", "model.weight_files"),
    "configuration": ("config", "plain_yaml", "training.ds_config"),
}


def lines_reached(target: str, inputs: Iterable[Path]) -> dict[str, str]:
    """{module: "reached of all"} lines of functions, when these inputs are read."""
    modules = {name: importlib.import_module(f"albef_ds.{name}") for name in READERS[target]}
    files = {module.__file__: name for name, module in modules.items()}
    reached: dict[str, set[int]] = {file: set() for file in files}

    def of_line(frame, event, argument):
        if event == "line":
            reached[frame.f_code.co_filename].add(frame.f_lineno)
        return of_line

    def of_call(frame, event, argument):
        return of_line if frame.f_code.co_filename in reached else None

    with tempfile.TemporaryDirectory() as scratch:
        for path in inputs:
            sys.settrace(of_call)
            threading.settrace(of_call)
            try:
                run(target, path.read_bytes(), Path(scratch))
            except Exception:  # a finding: the run itself reports it
                continue
            finally:
                sys.settrace(None)
                threading.settrace(None)
    found = {}
    for file, name in files.items():
        lines = _lines(compile(Path(file).read_text(), file, "exec"), top=True)
        found[name] = f"{len(reached[file] & lines)} of {len(lines)}"
    return found


def _lines(code: CodeType, top: bool = False) -> set[int]:
    """Lines inside functions; the module's own run when it is imported."""
    lines = (
        set()
        if top or code.co_name[:1].isupper()
        else {line for *_, line in code.co_lines() if line} - {code.co_firstlineno}
    )
    return lines.union(*(_lines(child) for child in code.co_consts if isinstance(child, CodeType)))
