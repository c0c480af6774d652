"""What an evaluation's numbers say: a section of the page for each task, from what summary.json holds under its name.

The forms are those of albef_ds.evaluation; what is not of them is left out, and the section says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from albef_ds.data.task_entries import ENTAILMENT_LABELS, NLVR_LABELS
from albef_ds.training.report_page import bars, gap, mapping, number, section, shown

RECALLS = [f"{way}@{k}" for way in ("tr", "ir") for k in (1, 5, 10)]
LABELS = {"entailment": ENTAILMENT_LABELS, "nlvr": NLVR_LABELS}
TITLES = {
    "retrieval": "Retrieval",
    "vqa": "Visual question answering",
    "entailment": "Visual entailment",
    "nlvr": "Reasoning over two images",
    "grounding": "Grounding",
}
GROUNDING = {
    "ranked": ("best proposal", "the best of the proposals has IoU ≥ 0.5 with the true box"),
    "pointing": ("pointing", "the hottest pixel lies in the true box"),
    "centre": ("centre", "the centre of the box drawn around the hottest region does"),
    "region": ("region", "that box has IoU ≥ 0.5 with the true one"),
}


def task_sections(summary: Mapping) -> str:
    """The sections of all tasks that summary.json names."""
    return "".join(_section(task, summary[task]) for task in TITLES if task in summary)


def main_numbers(summary: Mapping) -> list[tuple[str, str]]:
    """(label, percent) of the numbers that a task is judged by; "–" where unknown."""
    retrieval = mapping(summary.get("retrieval"))
    best = mapping(retrieval.get("itm")) or mapping(retrieval.get("itc"))
    everything = mapping(mapping(summary.get("grounding")).get("all"))
    measure = "pointing" if number(everything.get("ranked")) is None else "ranked"
    found = [
        ("TR@1", best.get("tr@1")),
        ("IR@1", best.get("ir@1")),
        ("VQA accuracy", mapping(summary.get("vqa")).get("accuracy")),
        ("entailment accuracy", mapping(summary.get("entailment")).get("accuracy")),
        ("NLVR accuracy", mapping(summary.get("nlvr")).get("accuracy")),
        (f"grounding: {GROUNDING[measure][0]}", everything.get(measure)),
    ]
    return [(label, shown(value, "{:.1f} %")) for label, value in found]


def _section(task: str, result) -> str:
    if not isinstance(result, dict):
        fault = gap(f'summary.json holds no mapping under "{task}": its numbers cannot be shown.')
        return section(TITLES[task], fault)
    if task in LABELS:
        return _classification(task, result)
    return {"retrieval": _retrieval, "vqa": _vqa, "grounding": _grounding}[task](result)


def _retrieval(result: Mapping) -> str:
    rows = []
    for key, label in (("itc", "ITC"), ("itm", "re-ranked by ITM")):
        if isinstance(result.get(key), dict):
            cells = "".join(f"<td>{shown(result[key].get(name))}</td>" for name in (*RECALLS, "mean"))
            rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    if not rows:
        return section(TITLES["retrieval"], gap("summary.json has neither ITC's recalls nor ITM's."))
    head = "".join(f"<th>{name.upper()}</th>" for name in RECALLS)
    images, texts, k_test = (shown(result.get(key), "{:.0f}") for key in ("images", "texts", "k_test"))
    note = (
        f"Recall in percent: TR finds texts for an image, IR images for a text. {images} images, {texts} texts, "
        f"k_test {k_test}."
    )
    table = f"<table><tr><th></th>{head}<th>mean</th></tr>{''.join(rows)}</table>"
    return section(TITLES["retrieval"], f'<div class="wide">{table}</div>', note)


def _vqa(result: Mapping) -> str:
    questions = shown(result.get("questions"), "{:,.0f}")
    if number(result.get("accuracy")) is None:
        return section(
            TITLES["vqa"],
            gap("No accuracy: the answers were not compared with annotations."),
            f"{questions} questions.",
        )
    types, kinds = mapping(result.get("per_answer_type")), mapping(result.get("per_question_type"))
    overall = bars({"all": result["accuracy"], **types})
    details = f"<details><summary>By the question's beginning: {len(kinds)}</summary>{bars(kinds)}</details>"
    note = f"VQA accuracy in percent, of all questions and by type of answer. {questions} questions."
    return section(TITLES["vqa"], overall + (details if kinds else ""), note)


def _classification(task: str, result: Mapping) -> str:
    sentences = shown(result.get("sentences"), "{:,.0f}")
    if number(result.get("accuracy")) is None:
        fault = gap("No accuracy: the sentences have no labels, or summary.json does not hold it.")
        return section(TITLES[task], fault, f"{sentences} sentences.")
    by_class = bars({"all": result["accuracy"], **mapping(result.get("per_class"))})
    confusion = _confusion(result.get("confusion"), LABELS[task])
    note = f"Accuracy in percent, of all and of each class; what was taken for what. {sentences} sentences."
    return section(TITLES[task], f'<div class="beside"><div>{by_class}</div>{confusion}</div>', note)


def _confusion(counts, labels: Sequence[str]) -> str:
    """[true class][class found], the darker the larger the share of the true class."""
    rows = counts if isinstance(counts, list) else []
    square = len(rows) == len(labels) and all(isinstance(row, list) and len(row) == len(labels) for row in rows)
    if not square or any((number(count) or -1) < 0 and number(count) != 0 for row in rows for count in row):
        return gap(f"The confusion table cannot be shown: expected {len(labels)} rows of as many counts.")
    lines = []
    for label, row in zip(labels, rows, strict=True):
        total = sum(row) or 1
        cells = "".join(
            f'<td style="background:rgba(0,114,178,{0.45 * count / total:.2f})">{count:,.0f}</td>' for count in row
        )
        lines.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    table = f'<table class="confusion"><tr><th>true ↓ found →</th>{head}</tr>{"".join(lines)}</table>'
    return f'<div class="wide">{table}</div>'


def _grounding(result: Mapping) -> str:
    splits = {split: scores for split, scores in result.items() if isinstance(scores, dict)}
    if not splits:
        return section(TITLES["grounding"], gap("summary.json has no split of the test set with its accuracies."))
    rows = []
    for split, scores in splits.items():
        cells = "".join(f"<td>{shown(scores.get(measure))}</td>" for measure in GROUNDING)
        rows.append(f"<tr><th>{escape(split)}</th>{cells}<td>{shown(scores.get('texts'), '{:,.0f}')}</td></tr>")
    head = "".join(f"<th>{label}</th>" for label, _ in GROUNDING.values())
    table = f"<table><tr><th></th>{head}<th>texts</th></tr>{''.join(rows)}</table>"
    meanings = "; ".join(f"{label}: {meaning}" for label, meaning in GROUNDING.values())
    unknown = any(number(scores.get("ranked")) is None for scores in splits.values())
    note = f"Percent of the texts; {meanings}.{' A dash: there were no proposals.' if unknown else ''}"
    return section(TITLES["grounding"], f'<div class="wide">{table}</div>', note)
