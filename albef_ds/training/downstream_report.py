"""One HTML file that compares the tasks after pre-training: fine-tuned, and as many steps from scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from albef_ds.training.report import curves_section, read_run, run_tiles
from albef_ds.training.report_examples import examples_section
from albef_ds.training.report_page import UNKNOWN, duration, gap, number, section, shown, write_page
from albef_ds.training.report_sections import task_sections

WIDTH, LABEL, BAR, SPACE = 380, 88, 15, 12  # of the chart, in its own units: about pixels
COLOURS = {"pretrained": "#0072b2", "scratch": "#e69f00"}
OTHER = "#5b5b5b"


def write_downstream_report(output: Path) -> Path:
    """Writes report.html into the folder of `downstream`, from its downstream.json and the folders of its runs.

    A table and a chart of all rows; then, for each task, numbers, curves and examples of the run that started from
    pre-trained weights. As in a run's own report, what is missing is said, every text is escaped, and the page allows
    no scripts and no requests.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    output = Path(output)
    if not output.is_dir():
        raise FileNotFoundError(f"{output}: no such folder; expected the output folder of the downstream tasks")
    gaps: list[str] = []
    rows = _rows(output / "downstream.json", gaps)
    shown_rows = _run_of_each_task(rows)
    name = output.resolve().name
    body = [
        f"<header><h1>After pre-training</h1><p>{escape(name)}</p></header>",
        *map(gap, gaps),
        _comparison(rows, [row.get("task") for row in shown_rows]),
        *(_task(output, row, place) for place, row in enumerate(shown_rows)),
    ]
    return write_page(output / "report.html", name, body)


def _rows(path: Path, gaps: list[str]) -> list[Mapping]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        gaps.append(f"{path.name} is missing: there is nothing to compare.")
        return []
    except (OSError, ValueError, RecursionError) as error:
        gaps.append(f"{path.name} cannot be read ({str(error).splitlines()[0]}): there is nothing to compare.")
        return []
    if not isinstance(rows, list):
        gaps.append(f"{path.name} holds no list: there is nothing to compare.")
        return []
    kept = [row for row in rows if isinstance(row, dict) and isinstance(row.get("task"), str)]
    if len(kept) < len(rows):
        gaps.append(f"{path.name}: {len(rows) - len(kept)} of {len(rows)} rows name no task and are left out.")
    if not rows:
        gaps.append(f"{path.name} is empty: no task has been run.")
    return kept


def _run_of_each_task(rows: Sequence[Mapping]) -> list[Mapping]:
    """The row that started from pre-trained weights, or the task's first where none did."""
    chosen: dict[str, Mapping] = {}
    for row in rows:
        if row["task"] not in chosen or (chosen[row["task"]].get("start") != "pretrained" == row.get("start")):
            chosen[row["task"]] = row
    return list(chosen.values())


def _comparison(rows: Sequence[Mapping], tasks: Sequence[str]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        texts = {
            key: f'<td class="left">{escape(str(row.get(key, UNKNOWN)))}</td>' for key in ("start", "measure", "run")
        }
        numbers = [shown(row.get(key), "{:,.0f}") for key in ("steps", "samples_per_s")]
        numbers = "".join(f"<td>{value}</td>" for value in (*numbers, duration(row.get("seconds"))))
        lines.append(
            f'<tr><th><a href="#task-{tasks.index(row["task"])}">{escape(row["task"])}</a></th>{texts["start"]}'
            f"<td>{shown(row.get('score'))}</td>{texts['measure']}{numbers}{texts['run']}</tr>"
        )
    # The score stands where a narrow screen still shows it.
    head = '<th>task</th><th class="left">start</th><th>score</th><th class="left">measure</th>'
    head += '<th>steps</th><th>samples/s</th><th>time</th><th class="left">folder</th>'
    table = f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
    note = "Scores in percent; the time is that of the whole run, evaluation included."
    return section("Pre-trained and from scratch", bar_chart(rows) + table, note)


def bar_chart(rows: Sequence[Mapping]) -> str:
    """One bar a row, of 100 percent, rows of a task together; an inline SVG."""
    parts, y, before = [], 4.0, None
    full = WIDTH - LABEL - 52  # room for the number behind the longest bar
    for row in rows:
        task, start, score = row["task"], str(row.get("start", "")), number(row.get("score"))
        if task != before:
            y += SPACE if before is not None else 0
            label = task if len(task) <= 12 else f"{task[:11]}…"
            parts.append(f'<text x="0" y="{y + 12:g}">{escape(label)}</text>')
        before = task
        length = full * min(100.0, max(0.0, score or 0.0)) / 100
        colour = COLOURS.get(start, OTHER)
        parts.append(f'<rect x="{LABEL}" y="{y:g}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>')
        parts.append(f'<text x="{LABEL + length + 6:.1f}" y="{y + 11:g}">{shown(score)}</text>')
        y += BAR
    y += SPACE
    parts.append(f'<line x1="{LABEL}" x2="{LABEL}" y1="0" y2="{y - SPACE / 2:g}" stroke="#b8bfc6"/>')
    x = LABEL
    for start in dict.fromkeys(str(row.get("start", "")) for row in rows):
        parts.append(f'<rect x="{x}" y="{y:g}" width="11" height="11" fill="{COLOURS.get(start, OTHER)}"/>')
        parts.append(f'<text class="dim" x="{x + 16}" y="{y + 10:g}">{escape(start[:16])}</text>')
        x += 110
    title = "Scores of the tasks, pre-trained and from scratch"
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {y + 16:g}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def _task(output: Path, row: Mapping, place: int) -> str:
    task, name = row["task"], row.get("run")
    title = f"{task}, {row.get('start', 'its start unknown')}"
    # A name that leads elsewhere is not one that `downstream` wrote.
    plain = isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
    folder = output / name if plain else None
    if folder is None or not folder.is_dir():
        content = gap(f"The folder of the run is missing: {name}")
    else:
        run = read_run(folder)
        content = "".join(
            [
                *map(gap, run.gaps),
                run_tiles(run),
                task_sections(run.summary),
                examples_section(run.samples),
                curves_section(run.lines),
            ]
        )
    return f'<div class="task" id="task-{place}"><h2>{escape(title)}</h2>{content}</div>'
