"""Draws what metrics.jsonl holds as small SVG pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#5b5b5b",
)  # told apart by the colour-blind
MOST_POINTS = 600  # of a curve; more cannot be seen and make the file large
SKIPPED = {"step", "losses", "window", "time", "eta_s", "nonfinite"}

PANELS = (  # title, keys (a * at the end: all that begin so), note
    ("Learning rate", ("lr",), ""),
    ("Alpha", ("alpha",), "weight of the teacher's soft targets"),
    ("Temperature", ("temperature",), ""),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    ("Mutual information", ("mi_bound*",), "lower bound that ITC gives, nats"),
    ("Samples per second", ("samples_per_s",), "all ranks"),
    ("Waiting for data", ("data_wait",), "share of the time"),
    ("Model FLOP utilisation", ("mfu",), "share of the device's peak"),
    ("Memory", ("memory_gib",), "GiB of one rank"),
)


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    curves: dict[str, list[tuple[int, float]]]  # name -> (step, value)


def panels(lines: Sequence[Mapping]) -> list[Panel]:
    """What there is to draw: the losses first, then known measures, then whatever else a task logged."""
    losses = {name for line in lines for name in (line.get("losses") or {})}
    found = [Panel("Losses", "", {name: _curve(lines, name, "losses") for name in _losses_in_order(losses)})]
    left = {key for line in lines for key in line} - SKIPPED
    for title, patterns, note in PANELS:
        keys = sorted(key for key in left if any(_matches(key, pattern) for pattern in patterns))
        left -= set(keys)
        found.append(Panel(title, note, {key: _curve(lines, key) for key in keys}))
    found += [Panel(key, "", {key: _curve(lines, key)}) for key in sorted(left)]
    drawn = [Panel(p.title, p.note, {name: curve for name, curve in p.curves.items() if curve}) for p in found]
    return [panel for panel in drawn if panel.curves]


def svg(panel: Panel, width: float = 4.6, height: float = 2.7) -> bytes:
    """One panel as an SVG file, text as text."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for (name, curve), colour in zip(panel.curves.items(), _cycled(len(panel.curves)), strict=True):
            steps, values = zip(*curve, strict=True)
            marker = "o" if len(curve) == 1 else None
            # A name that begins with an underscore would be left out of the legend, and "$" would start formulas.
            axes.plot(steps, values, color=colour, linewidth=1.4, marker=marker, label=_plain(name))
        if len(panel.curves) > 1:
            axes.legend(frameon=False, ncols=min(len(panel.curves), 4), loc="upper right")
        axes.set_xlabel("step")
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()


def _curve(lines: Sequence[Mapping], key: str, section: str | None = None) -> list[tuple[int, float]]:
    points = []
    for line in lines:
        value = (line.get(section) or {}).get(key) if section else line.get(key)
        if isinstance(line.get("step"), int) and _is_number(value):
            points.append((line["step"], float(value)))
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def _is_number(value) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond floating point
        return False


def _losses_in_order(names: set[str]) -> list[str]:
    return sorted(names - {"total"}) + (["total"] if "total" in names else [])


def _matches(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def _cycled(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _plain(name: str) -> str:
    return name.lstrip("_").replace("$", r"\$")
