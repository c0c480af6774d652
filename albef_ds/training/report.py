"""One HTML file that shows a run: its numbers, curves, and what it finds for test images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from albef_ds.training.curves import Panel, panels, svg
from albef_ds.training.json_lines import read_lines
from albef_ds.training.report_examples import AnyExample, examples_section, remember, remembered
from albef_ds.training.report_page import data_uri, duration, gap, mapping, number, shown, tiles, write_page
from albef_ds.training.report_sections import TITLES, main_numbers, task_sections

REJECTED_SHOWN = 20


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind, as far as it can be read; `gaps` says in sentences what cannot."""

    name: str
    config: Mapping
    summary: Mapping
    lines: list[dict]  # of metrics.jsonl
    rejected: list[dict]
    samples: Sequence[AnyExample]
    gaps: tuple[str, ...]


def write_report(output_dir: str | Path, *, samples: Sequence[AnyExample] | None = None) -> Path:
    """Writes report.html into a run's folder, from its config.yaml, metrics.jsonl, summary.json and rejected.jsonl.

    What is missing or unreadable there is left out, and the report says so. Every text (captions, file names, values)
    is untrusted and escaped; the page allows no scripts and no requests.

    Args:
        samples: test images with what was found for them (albef_ds.evaluation.examples.Example, or RetrievalExample);
            kept in examples.json, and read from there where None.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the output folder of a run")
    if samples is not None:
        remember(folder / "examples.json", samples)
    run = read_run(folder, samples)
    body = [
        f"<header><h1>{escape(str(run.config.get('task', 'albef_ds')))}</h1><p>{escape(run.name)}</p></header>",
        *map(gap, run.gaps),
        run_tiles(run),
        task_sections(run.summary),
        examples_section(run.samples),
        curves_section(run.lines),
        _rejected(run.rejected),
        _table("Summary", {k: v for k, v in run.summary.items() if k not in TITLES}),
        _table("Configuration", run.config),
    ]
    return write_page(folder / "report.html", run.name, body)


def read_run(folder: Path, samples: Sequence[AnyExample] | None = None) -> RunFolder:
    """Reads a run's folder. samples: None: those that examples.json remembers."""
    gaps: list[str] = []
    config = _read(folder / "config.yaml", yaml.safe_load, "the configuration", gaps)
    summary = _read(folder / "summary.json", json.loads, "the summary and the evaluation", gaps)
    lines = [line for line in _lines(folder / "metrics.jsonl", gaps) if isinstance(line.get("losses") or {}, dict)]
    if not lines:
        gaps.append("metrics.jsonl is missing or empty: no curves.")
    if samples is None:
        samples = remembered(folder / "examples.json", gaps)
    if not samples:
        gaps.append("No test images are known of this run: none are shown.")
    rejected = _lines(folder / "rejected.jsonl", gaps)
    return RunFolder(folder.resolve().name, config, summary, lines, rejected, samples, tuple(gaps))


def run_tiles(run: RunFolder) -> str:
    """The task's main number first, then how the run went."""
    summary, last = run.summary, run.lines[-1] if run.lines else {}

    def either(key: str) -> float | None:
        return number(summary.get(key, last.get(key)))

    return tiles(
        [
            *main_numbers(summary),
            ("steps", shown(summary.get("steps", last.get("step")), "{:,.0f}")),
            ("time", duration(summary.get("seconds"))),
            ("samples/s", shown(either("samples_per_s"), "{:,.0f}")),
            ("total loss", shown(mapping(last.get("losses")).get("total"), "{:.3f}")),
            ("MFU", shown(either("mfu"), "{:.1%}")),
            ("memory", shown(either("memory_gib"), "{:.1f} GiB")),
        ]
    )


def curves_section(lines: Sequence[Mapping]) -> str:
    """The losses large, whatever else was logged small beneath them; "" where nothing was."""
    figures = [_figure(panel) for panel in panels(lines)]
    if not figures:
        return ""
    return f'<section><h2>Curves</h2><div class="curves">{"".join(figures)}</div></section>'


def _figure(panel: Panel) -> str:
    large = panel.title == "Losses"
    small = data_uri("image/svg+xml", svg(panel))
    picture = data_uri("image/svg+xml", svg(panel, 9.4, 3.4)) if large else small
    # Reduced to a narrow screen, the large one could not be read.
    narrow = f'<source media="(max-width: 520px)" srcset="{small}">' if large else ""
    note = f" <small>{escape(panel.note)}</small>" if panel.note else ""
    return (
        f'<figure class="{"large" if large else "small"}"><figcaption>{escape(panel.title)}{note}</figcaption>'
        f'<picture>{narrow}<img alt="{escape(panel.title)} over the steps" src="{picture}"></picture></figure>'
    )


def _read(path: Path, parse, what: str, gaps: list[str]) -> Mapping:
    """A mapping from a file; {} and a word about it where there is none."""
    if not path.exists():
        gaps.append(f"{path.name} is missing: {what} cannot be shown.")
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        gaps.append(f"{path.name} cannot be read ({str(error).splitlines()[0]}): {what} cannot be shown.")
        return {}
    if not isinstance(content, dict):
        gaps.append(f"{path.name} holds no mapping: {what} cannot be shown.")
        return {}
    return content


def _lines(path: Path, gaps: list[str]) -> list[dict]:
    try:
        return read_lines(path)
    except (OSError, ValueError) as error:
        gaps.append(f"{path.name} cannot be read ({error}).")
        return []


def _rejected(lines: Sequence[Mapping]) -> str:
    if not lines:
        return ""
    rows = "".join(
        f"<tr><td>{escape(str(line.get('key')))}</td><td>{escape(str(line.get('reason')))}</td></tr>"
        for line in lines[:REJECTED_SHOWN]
    )
    more = f"<p>and {len(lines) - REJECTED_SHOWN} more in rejected.jsonl</p>" if len(lines) > REJECTED_SHOWN else ""
    return (
        f"<section><h2>Rejected samples: {len(lines)}</h2>"
        f'<div class="wide"><table class="text"><tr><th>sample</th><th>reason</th></tr>{rows}</table></div>'
        f"{more}</section>"
    )


def _table(title: str, content: Mapping) -> str:
    if not content:
        return ""
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in _flat(content))
    return f'<details><summary>{title}</summary><div class="wide"><table class="text">{rows}</table></div></details>'


def _flat(content: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in content.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", f"{value:.6g}" if isinstance(value, float) else str(value)))
    return rows
