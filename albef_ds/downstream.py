"""Every task after pre-training, on Shapes World: fine-tuned from the demo's weights, and as many steps from scratch.

    make downstream        (or: python -m albef_ds downstream; after make demo, whose weights it starts from)

Writes a run's folder for each task, with and without pre-training, and one page that compares them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from albef_ds.config import ConfigError
from albef_ds.data.files import write_atomically
from albef_ds.data.shapes_tasks import ShapesTasks, write_shapes_tasks
from albef_ds.data.shapes_world import ShapesWorld
from albef_ds.demo import launch


@dataclass(frozen=True)
class Measure:
    """The number that a task is judged by: where it stands in summary.json, what it is called."""

    path: tuple[str, ...]
    label: str


MEASURES = {
    "retrieval": Measure(("retrieval", "itm", "tr@1"), "TR@1, re-ranked by ITM"),
    "vqa": Measure(("vqa", "accuracy"), "VQA accuracy"),
    "entailment": Measure(("entailment", "accuracy"), "accuracy"),
    "nlvr": Measure(("nlvr", "accuracy"), "accuracy"),
    "grounding": Measure(("grounding", "all", "ranked"), "best proposal, IoU >= 0.5"),
}


def tasks_named(names: str) -> tuple[str, ...]:
    """`all`, or names separated by commas. Raises ConfigError for one that is none."""
    tasks = tuple(MEASURES) if names == "all" else tuple(name.strip() for name in names.split(","))
    unknown = [task for task in tasks if task not in MEASURES]
    if unknown:
        raise ConfigError(f"--tasks {names}: {', '.join(unknown)} is none of {', '.join(MEASURES)}")
    return tasks


def downstream(
    demo: Path,
    output: Path,
    tasks: Sequence[str] = tuple(MEASURES),
    scratch: bool = True,
    overrides: Sequence[str] = (),
    split: str = "test",
) -> int:
    """Runs the tasks one after another; returns the first exit status that is not 0.

    Args:
        demo: the demo's folder, with data/ and albef.pth.
        scratch: whether each is also trained without pre-training.
        split: what they are judged on, "test" or "val". Settings are chosen by "val".

    Raises:
        ConfigError: there is no demo there.
    """
    weights, world = demo / "albef.pth", ShapesWorld.at(demo / "data")
    if not (weights.is_file() and world.meta.is_file()):
        raise ConfigError(f"{demo}: no finished demo there; run `make demo` first, or name its folder with --demo")
    data = write_shapes_tasks(output / "data", world)
    rows = []
    for task in tasks:
        for start in ("pretrained", "scratch") if scratch else ("pretrained",):
            folder, began = output / f"{task}_{start}", time.perf_counter()
            settings = [*_paths(task, data, world, split), *overrides]
            status = _train(task, folder, settings, weights if start == "pretrained" else None, world)
            if status:
                return status
            rows.append(_row(task, start, folder, time.perf_counter() - began))
            print(f"{task:10} {start:10} {rows[-1]['score']:5.1f} {MEASURES[task].label}, {rows[-1]['seconds']:.0f} s")
    write_atomically(output / "downstream.json", json.dumps(rows, indent=1))
    from albef_ds.training.downstream_report import write_downstream_report  # loads matplotlib: only where it is used

    print(f"report: {write_downstream_report(output)}")
    return 0


def _train(task: str, folder: Path, settings: list[str], weights: Path | None, world: ShapesWorld) -> int:
    if task == "nlvr" and weights is not None:  # as the paper prepares it
        assigned = folder.with_name("text_assignment")
        captions = [f"data.train=[{world.train}]", f"data.tokenizer={world.vocab}", f"data.image_root={world.root}"]
        status = launch("shapes_text_assignment", [f"output_dir={assigned}", *captions, f"model.weights={weights}"])
        if status:
            return status
        weights = assigned / "albef.pth"
    start = [f"model.weights={weights}"] if weights else []
    return launch(f"shapes_{task}", [f"output_dir={folder}", *settings, *start])


def _paths(task: str, data: ShapesTasks, world: ShapesWorld, split: str) -> list[str]:
    paths = [f"data.tokenizer={world.vocab}", f"data.image_root={world.root}"]
    paths += [f"data.train=[{getattr(data, f'{task}_train')}]", f"data.test={getattr(data, f'{task}_{split}')}"]
    if task == "vqa":
        annotations = getattr(data, f"vqa_{split}_annotations")
        paths += [f"data.test_annotations={annotations}", f"data.answer_list={data.answer_list}"]
    return paths


def _row(task: str, start: str, folder: Path, seconds: float) -> dict:
    summary = json.loads((folder / "summary.json").read_text())
    score = summary
    for key in MEASURES[task].path:
        score = score[key]
    return {
        "task": task,
        "start": start,
        "measure": MEASURES[task].label,
        "score": score,
        "steps": summary["steps"],
        "samples_per_s": summary["samples_per_s"],
        "seconds": seconds,
        "training_seconds": summary["seconds"],
        "run": folder.name,
    }
