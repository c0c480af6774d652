"""Files of one JSON object a line, which a killed process may leave with half a line at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a .jsonl file; [] where there is none. Lines cut short by a kill are passed over."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines of metrics.jsonl up to `step`, each step once; replaces the file in one move."""
    if not path.exists():
        return
    kept = {line["step"]: line for line in read_lines(path) if isinstance(line.get("step"), int)}
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(kept[s]) + "\n" for s in sorted(kept) if s <= step), encoding="utf-8")
    os.replace(part, path)
