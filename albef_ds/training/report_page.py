"""The shell of a report: one HTML file that runs no scripts and loads nothing, and the small parts that pages share.

Whatever comes from a run (captions, labels, file names, numbers) is untrusted: `section`, `gap`, `bars` and `tiles`
escape every text they are given, and `number` takes nothing but finite numbers.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from datetime import timedelta
from html import escape
from pathlib import Path

from albef_ds.data.files import write_atomically

UNKNOWN = "–"


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    """Writes the page, whole or not at all. title: a plain text; body: markup, empty parts are left out."""
    page = PAGE.format(title=escape(f"{title} – albef_ds"), style=STYLE, body="\n".join(filter(None, body)))
    # Half a surrogate pair in a caption is no reason to fail.
    write_atomically(path, page.encode("utf-8", errors="replace").decode("utf-8"))
    return path


def section(title: str, content: str, note: str = "") -> str:
    """content: markup; title and note: plain texts."""
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(note)}</p>' if note else ''}{content}</section>"


def gap(text: str) -> str:
    """What is missing and why, where a reader would look for it."""
    return f'<p class="gap">{escape(text)}</p>'


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def number(value) -> float | None:
    """A finite number as such; None for everything else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond floating point
        return None


def shown(value, form: str = "{:.1f}") -> str:
    value = number(value)
    return UNKNOWN if value is None else form.format(value)


def duration(seconds) -> str:
    """h:mm:ss, with days in front where there are any."""
    value = number(seconds)
    return UNKNOWN if value is None or abs(value) > 1e9 else str(timedelta(seconds=round(value)))


def mapping(value) -> Mapping:
    return value if isinstance(value, dict) else {}


def tiles(found: Iterable[tuple[str, str]]) -> str:
    """(label, number as text) side by side; unknown ones are left out."""
    known = [(label, value) for label, value in found if value != UNKNOWN]
    shown = [f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in known]
    return f'<section class="tiles">{"".join(shown)}</section>' if shown else ""


def bars(percents: Mapping) -> str:
    """{label: percent} as a table with a bar in each row."""
    rows = []
    for label, percent in percents.items():
        width = min(100.0, max(0.0, number(percent) or 0.0))
        bar = f'<td class="bar"><span style="width:{width:.1f}%"></span></td>'
        rows.append(f"<tr><th>{escape(str(label))}</th><td>{shown(percent)}</td>{bar}</tr>")
    return f'<table class="bars">{"".join(rows)}</table>' if rows else ""


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; --ink: #1d2329; --dim: #66717c; --line: #e2e5e9; --blue: #0072b2; --green: #00734f; }
:root { --orange: #b45309; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: 0 0 16px; color: var(--dim); overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 18px; overflow-wrap: anywhere; }
h3 { margin: 20px 0 4px; font-size: 15px; }
a { color: var(--blue); }
section, details { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
section, details { padding: 16px; margin: 16px 0; }
section section, section details { padding: 0; border: 0; }
section details summary { font-size: 15px; }
section > p { margin: 0 0 12px; color: var(--dim); overflow-wrap: anywhere; }
.gap { background: #fff6df; border: 1px solid #f0dca4; border-radius: 8px; padding: 6px 12px; margin: 8px 0; }
.gap { overflow-wrap: anywhere; }
section > p.gap { color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 12px; }
.tiles b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; color: var(--blue); }
.tiles span { color: var(--dim); font-size: 13px; }
.wide { overflow-x: auto; }
.beside { display: flex; flex-wrap: wrap; gap: 8px 48px; align-items: flex-start; }
.beside > * { flex: 1 1 260px; min-width: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, .text th, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.text td:first-child { color: var(--dim); }
.left { text-align: left; }
.task { margin-top: 40px; }
.task > h2 { font-size: 22px; }
.bars { width: 100%; }
.bars th { width: 40%; font-weight: 400; white-space: normal; overflow-wrap: anywhere; }
.bars .bar { width: 50%; padding-right: 0; }
.bar span { display: block; height: 10px; border-radius: 2px; background: var(--blue); }
.confusion th, .confusion td { padding: 6px 12px; }
.confusion th:first-child { padding-left: 0; }
.confusion tr:first-child th { font-weight: 400; color: var(--dim); }
.chart { display: block; width: 100%; max-width: 520px; height: auto; margin: 8px 0 16px; }
.chart text { font-size: 13px; fill: var(--ink); }
.chart .dim { fill: var(--dim); font-size: 11px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
.cards.double { grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.cards + .cards { margin-top: 16px; }
article { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
article > div { padding: 10px 14px 12px; overflow-wrap: anywhere; }
article > .pictures { display: flex; gap: 2px; padding: 0; background: #eceff2; }
.pictures > * { flex: 1 1 0; min-width: 0; }
.pictures img { display: block; width: 100%; height: 220px; object-fit: contain; }
.pictures .gap { margin: 8px; align-self: center; }
.says { margin: 0 0 6px; font-weight: 600; }
.answer { margin: 2px 0; color: var(--dim); }
.answer b { color: var(--ink); font-weight: 600; }
.answer.right b { color: var(--green); }
.answer.wrong b { color: var(--orange); }
.keys { display: block; }
.keys > span { display: inline-block; margin-right: 16px; }
.key { display: inline-block; width: 26px; height: 0; margin: 0 6px 4px 0; border-top: 3px solid #009e73; }
.key.found { border-top: 3px dashed #e69f00; }
.key.heat { height: 10px; margin-bottom: 0; border: 0; background: linear-gradient(90deg, #00224e, #7d7c78, #fee838); }
ol, ul { margin: 0; padding-left: 22px; }
li { margin: 4px 0; overflow-wrap: anywhere; }
li small { display: block; color: var(--dim); font-size: 12px; }
li.right { color: var(--green); font-weight: 600; }
li.right small { font-weight: 400; }
.own { margin: 8px 0 0; font-size: 13px; color: var(--dim); }
.own + ul { font-size: 13px; color: var(--dim); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; }
figure.large { grid-column: 1 / -1; }
figure img { width: 100%; height: auto; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
figcaption small { font-weight: 400; color: var(--dim); }
details summary { cursor: pointer; font-weight: 600; font-size: 16px; }
@media (max-width: 520px) {
  th, td { padding-right: 8px; }
  th { white-space: normal; }
  .confusion th, .confusion td { padding: 6px 4px; font-size: 12px; }
  .double .pictures img { height: 160px; }
}
"""
