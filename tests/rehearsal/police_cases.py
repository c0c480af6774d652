"""What a trained model does on a policed GPU (policed.py), and what the police says of faults that are planted in it.

`python -m tests.rehearsal.police` runs them, in a process of its own. What a case gives is compared with what the CPU
gives, where that is a number for every input: arithmetic is bf16 on a GPU.
"""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from albef_ds.data.augment import STD
from albef_ds.data.dali_pipeline import dali_available
from albef_ds.inference.explain import sheet
from albef_ds.inference.search import ImageIndex
from albef_ds.inference.teacher_view import Example, pseudo_targets
from tests.inference.conftest import KINDS, TEXTS
from tests.rehearsal import police_faults, police_rules, policed
from tests.rehearsal.police_world import ASKED, World
from tests.shapes_recipes import EVALUATED

BF16, FP32 = 0.05, 1e-4  # how far results may be from the CPU's


@dataclass(frozen=True)
class Case:
    """`run` raises where something is wrong; refused: what it has to be refused with (a pattern), None: it must not."""

    name: str
    run: Callable[[World], object]
    refused: str | None = None
    planted: Callable[[], AbstractContextManager] = nullcontext


def _evaluated(task: str, **how) -> Callable[[World], object]:
    def run(world: World) -> object:
        found = world.evaluate(task, **how)
        assert found.examples and json.dumps(found.metrics)  # numbers, not tensors
        return found.score

    return run


def _used(kind: str, use: Callable, apart: float = BF16) -> Callable[[World], object]:
    """`use(model, world)` on the GPU, compared with the same on the CPU."""

    def run(world: World) -> object:
        found, expected = (use(world.model(kind, device), world) for device in ("cuda", "cpu"))
        _same(found, expected, apart)
        return type(found).__name__

    return run


def _same(found: object, expected: object, apart: float) -> None:
    if isinstance(expected, Tensor):
        assert type(found) is Tensor, "a result that lies on the GPU"
        torch.testing.assert_close(found, expected, rtol=apart, atol=apart)
    elif isinstance(expected, list | tuple):
        for pair in zip(found, expected, strict=True):
            _same(*pair, apart)
    else:
        assert type(found) is type(expected)


def _fused(model, world: World) -> Tensor:
    pairs = [*zip(world.pictures, world.pictures[::-1], strict=True)]
    return model.multimodal_features(pairs if model.task == "nlvr" else world.pictures, TEXTS, batch_size=3)


def _classified(model, world: World) -> Tensor:
    pairs = [*zip(world.pictures, world.pictures[::-1], strict=True)]
    labels = model.classify(pairs if model.task == "nlvr" else world.pictures, TEXTS)
    return torch.tensor([[*label.probabilities.values()] for label in labels])


def _heat(by: str) -> Callable:
    def use(model, world: World) -> list:
        found = model.heatmaps(world.pictures[0], TEXTS[1], by=by)
        sheet(world.pictures[0], TEXTS[1], found, world.folder / "sheet.png")
        return [found.maps, found.whole / found.whole.max(), torch.tensor(found.score)]

    return use


def _searched(model, world: World) -> list:
    index = ImageIndex.build(model, world.files, batch_size=2)
    found = [index.by_text(model, "a red circle", 5), index.by_image(model, world.pictures[1], 5)]
    return [torch.tensor(sorted(hit.similarity for hit in hits)) for hits in found]


def _answered(answers: list[str] | None) -> Callable:
    def use(model, world: World) -> Tensor:
        found = model.answer(world.pictures, ASKED, answers=answers, k=2, batch_size=3)
        return torch.tensor([sum(answer.probability for answer in best) for best in found])

    return use


def _loaded(world: World) -> object:
    """DALI's GPU pipeline, decoding on the CPU, and what PyTorch does with its images on the GPU."""
    (there,), (here,) = (world.dali_batches(device, count=1) for device in (policed.GPU, torch.device("cpu")))
    assert there.images.is_cuda and there.text.input_ids.is_cuda and there.masked.labels.is_cuda
    assert there.keys == here.keys and torch.equal(there.masked.input_ids.cpu(), here.masked.input_ids)
    grey = (there.images.cpu() - here.images).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
    assert grey.mean() < 2, grey.mean()
    return grey.mean()


def _taught(world: World) -> object:
    examples = [Example(path, text) for path, text in zip(sorted(world.files.iterdir()), ASKED, strict=True)]
    views = pseudo_targets(world.teacher(), examples, pairs=3, batch_size=2)
    return [view.word for view in views]


USES = (
    ("image features", "pretraining", lambda model, world: model.image_features(world.pictures, batch_size=3), BF16),
    ("text features", "retrieval", lambda model, world: model.text_features(TEXTS, batch_size=3), BF16),
    ("similarity", "pretraining", lambda model, world: model.similarity(world.pictures, TEXTS), BF16),
    *((f"multimodal features, {kind}", kind, _fused, 4 * BF16) for kind in KINDS),
    ("match", "retrieval", lambda model, world: model.match(world.pictures, TEXTS), 2 * BF16),
    ("match one image", "pretraining", lambda model, world: model.match(world.pictures[0], TEXTS), 2 * BF16),
    ("heat maps by itm", "retrieval", _heat("itm"), FP32),
    ("heat maps by itc", "pretraining", _heat("itc"), FP32),
    ("search", "retrieval", _searched, BF16),
    ("classify, entailment", "entailment", _classified, 2 * BF16),
    ("classify, nlvr", "nlvr", _classified, 2 * BF16),
    ("answer from a list", "vqa", _answered(["red", "blue square", "circle"]), 2 * BF16),
    ("answer freely", "vqa", _answered(None), 4 * BF16),
)
CASES = (
    *(Case(f"evaluate {task}", _evaluated(task)) for task in EVALUATED),
    Case("evaluate vqa, written freely", _evaluated("vqa", freely=True)),
    Case("evaluate grounding by itc", _evaluated("grounding", heatmap="itc")),
    Case("evaluate grounding with relations", _evaluated("grounding", relations=True)),
    *(Case(name, _used(kind, use, apart)) for name, kind, use, apart in USES),
    Case("the teacher's view", _taught),
    *([Case("dali's batches", _loaded)] if dali_available() else []),
)
RULES = tuple(Case(f"rule: {name}", rule, refused) for name, rule, refused in police_rules.RULES)
_BY_NAME = {case.name: case for case in CASES}
PLANTED = tuple(
    Case(f"planted: {fault.name}", _BY_NAME[fault.case].run, fault.refused, fault.plant)
    for fault in police_faults.FAULTS
)


ALL = (*RULES, *CASES, *PLANTED)


def row_of(case: Case, world: World) -> dict:
    """{"case", "said": what it gave, "error": what it ended with, "where": the lines of the package it ended in}."""
    try:
        with case.planted():
            said = case.run(world)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        where = [f"{frame.filename}:{frame.lineno}" for frame in frames if "rehearsal" not in frame.filename][-3:]
        return {"case": case.name, "said": "", "error": f"{type(error).__name__}: {error}", "where": where}
    return {"case": case.name, "said": str(said)[:80], "error": "", "where": []}


def run_all() -> None:
    """Prints a JSON row a case."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, policed.install():
        world = World(Path(folder))
        for case in ALL:
            print(json.dumps(row_of(case, world)), flush=True)
