"""One HTML file that shows a run: its numbers, curves, and what it finds for test images."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from html import escape
from pathlib import Path

import yaml
from PIL import Image

from albef_ds.data.images import ImageError, decode_image
from albef_ds.evaluation.retrieval import FoundCaption, RetrievalExample
from albef_ds.training.curves import panels, svg
from albef_ds.training.json_lines import read_lines

THUMBNAIL = 320  # pixels of the longer side
REJECTED_SHOWN = 20


def write_report(output_dir: str | Path, *, samples: Sequence[RetrievalExample] | None = None) -> Path:
    """Writes report.html into a run's folder, from its config.yaml, metrics.jsonl, summary.json and rejected.jsonl.

    What is missing or unreadable there is left out, and the report says so. Every text (captions, file names, values)
    is untrusted and escaped; the page allows no scripts and no requests.

    Args:
        samples: test images with the captions found for them; kept in examples.json, and read from there where None.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the output folder of a run")
    gaps: list[str] = []
    config = _read(folder / "config.yaml", yaml.safe_load, "the configuration", gaps)
    summary = _read(folder / "summary.json", json.loads, "the summary and the evaluation", gaps)
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        gaps.append("metrics.jsonl is missing or empty: no curves.")
    samples = _remembered(folder / "examples.json", samples)
    if not samples:
        gaps.append("No test images with captions are known of this run: none are shown.")

    name = folder.resolve().name
    body = [
        f"<header><h1>{escape(str(config.get('task', 'albef_ds')))}</h1><p>{escape(name)}</p></header>",
        "".join(f'<p class="gap">{escape(gap)}</p>' for gap in gaps),
        _tiles(summary, lines),
        _retrieval(summary.get("retrieval")),
        _samples(samples or ()),
        _curves(lines),
        _rejected(read_lines(folder / "rejected.jsonl")),
        _table("Summary", {k: v for k, v in summary.items() if k != "retrieval"}),
        _table("Configuration", config),
    ]
    page = PAGE.format(title=escape(f"{name} – albef_ds"), style=STYLE, body="\n".join(filter(None, body)))
    path, part = folder / "report.html", folder / "report.html.part"
    part.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair in a caption is no reason to fail
    os.replace(part, path)
    return path


def _remembered(path: Path, samples: Sequence[RetrievalExample] | None) -> Sequence[RetrievalExample]:
    if samples is not None:
        path.write_text(json.dumps([asdict(sample) for sample in samples], indent=1), encoding="utf-8")
        return samples
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            RetrievalExample(e["image"], tuple(e["captions"]), tuple(FoundCaption(**f) for f in e["found"]))
            for e in entries
        ]
    except (OSError, ValueError, TypeError, KeyError):  # none, or not by us: the report says that it has none
        return []


def _read(path: Path, parse, what: str, gaps: list[str]) -> dict:
    """A mapping from a file; {} and a word about it where there is none."""
    if not path.exists():
        gaps.append(f"{path.name} is missing: {what} cannot be shown.")
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, yaml.YAMLError) as error:
        gaps.append(f"{path.name} cannot be read ({str(error).splitlines()[0]}): {what} cannot be shown.")
        return {}
    if not isinstance(content, dict):
        gaps.append(f"{path.name} holds no mapping: {what} cannot be shown.")
        return {}
    return content


def _tiles(summary: Mapping, lines: Sequence[Mapping]) -> str:
    last = lines[-1] if lines else {}
    retrieval = summary.get("retrieval") if isinstance(summary.get("retrieval"), dict) else {}
    best = retrieval.get("itm") or retrieval.get("itc") or {}
    tiles = [
        ("TR@1", best.get("tr@1"), "{:.1f} %"),
        ("IR@1", best.get("ir@1"), "{:.1f} %"),
        ("steps", summary.get("steps", last.get("step")), "{:,}"),
        ("time", summary.get("seconds"), None),
        ("samples/s", summary.get("samples_per_s", last.get("samples_per_s")), "{:,.0f}"),
        ("total loss", (last.get("losses") or {}).get("total"), "{:.3f}"),
        ("MFU", summary.get("mfu", last.get("mfu")), "{:.1%}"),
        ("memory", summary.get("memory_gib", last.get("memory_gib")), "{:.1f} GiB"),
    ]
    shown = [
        f"<div><b>{escape(_number(value, form))}</b><span>{escape(label)}</span></div>"
        for label, value, form in tiles
        if isinstance(value, int | float)
    ]
    return f'<section class="tiles">{"".join(shown)}</section>' if shown else ""


def _number(value: float, form: str | None) -> str:
    return str(timedelta(seconds=round(value))) if form is None else form.format(value)


def _retrieval(result) -> str:
    if not isinstance(result, dict):
        return ""
    rows = []
    for key, label in (("itc", "ITC"), ("itm", "re-ranked by ITM")):
        if isinstance(result.get(key), dict):
            cells = "".join(
                f"<td>{_cell(result[key].get(f'{way}@{k}'))}</td>" for way in ("tr", "ir") for k in (1, 5, 10)
            )
            rows.append(f"<tr><th>{label}</th>{cells}<td>{_cell(result[key].get('mean'))}</td></tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{way}@{k}</th>" for way in ("TR", "IR") for k in (1, 5, 10))
    size = f"{result.get('images')} images, {result.get('texts')} texts, k_test {result.get('k_test')}"
    note = f"Recall in percent: TR finds texts for an image, IR images for a text. {size}."
    table = f"<table><tr><th></th>{head}<th>mean</th></tr>{''.join(rows)}</table>"
    return f'<section><h2>Retrieval</h2><p>{escape(note)}</p><div class="wide">{table}</div></section>'


def _cell(value) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else "–"


def _samples(samples: Sequence[RetrievalExample]) -> str:
    if not samples:
        return ""
    cards = []
    for sample in samples:
        found = "".join(
            f'<li class="{"right" if f.right else "other"}">{escape(f.caption)}{" <b>✓</b>" if f.right else ""}'
            f"<small>ITM {f.itm:+.2f}, ITC {f.itc:+.3f}</small></li>"
            for f in sample.found
        )
        missed = [c for c in sample.captions if not any(f.right and f.caption == c for f in sample.found)]
        own = "".join(f"<li>{escape(caption)}</li>" for caption in missed)
        own = f'<p class="own">Not among them:</p><ul>{own}</ul>' if own else ""
        cards.append(f"<article>{_picture(sample.image)}<div><ol>{found}</ol>{own}</div></article>")
    note = "The captions found for test images among all texts of the test set, best first; ✓ marks those of the image."
    return f'<section><h2>Test images</h2><p>{note}</p><div class="cards">{"".join(cards)}</div></section>'


def _picture(path: str) -> str:
    name = escape(Path(path).name)
    try:
        image = decode_image(path)
    except ImageError as error:
        return f'<p class="gap">{escape(error.reason)}: {name}</p>'
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f'<img alt="{name}" src="{_uri("image/jpeg", file.getvalue())}">'


def _curves(lines: Sequence[Mapping]) -> str:
    figures = []
    for panel in panels(lines):
        first = panel.title == "Losses"
        picture = _uri("image/svg+xml", svg(panel, *((9.4, 3.4) if first else ())))
        note = f" <small>{escape(panel.note)}</small>" if panel.note else ""
        figures.append(
            f'<figure class="{"large" if first else "small"}"><figcaption>{escape(panel.title)}{note}</figcaption>'
            f'<img alt="{escape(panel.title)} over the steps" src="{picture}"></figure>'
        )
    if not figures:
        return ""
    return f'<section><h2>Curves</h2><div class="curves">{"".join(figures)}</div></section>'


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


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
header h1 { margin: 0; font-size: 28px; letter-spacing: -.01em; }
header p { margin: 0 0 16px; color: var(--dim); overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 18px; }
section, details { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
section, details { padding: 16px; margin: 16px 0; }
section > p { margin: 0 0 12px; color: var(--dim); }
.gap { background: #fff6df; border: 1px solid #f0dca4; border-radius: 8px; padding: 6px 12px; margin: 8px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 12px; }
.tiles b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; color: var(--blue); }
.tiles span { color: var(--dim); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, .text th, .text td { text-align: left; }
.text td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.text td:first-child { color: var(--dim); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
article { border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }
article > img { display: block; width: 100%; height: 200px; object-fit: contain; background: #eceff2; }
article > div { padding: 10px 14px 12px; }
ol, ul { margin: 0; padding-left: 22px; }
li { margin: 4px 0; overflow-wrap: anywhere; }
li small { display: block; color: var(--dim); font-size: 12px; }
li.right { color: var(--green); font-weight: 600; }
li.right small { font-weight: 400; }
.own { margin: 8px 0 0; font-size: 13px; color: var(--dim); }
.own + ul { font-size: 13px; color: var(--dim); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
figure { margin: 0; }
figure.large { grid-column: 1 / -1; }
figure img { width: 100%; height: auto; }
figcaption { font-weight: 600; }
figcaption small { font-weight: 400; color: var(--dim); }
details summary { cursor: pointer; font-weight: 600; font-size: 16px; }
"""
