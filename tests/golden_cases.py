"""Reads the recorded cases of tests/golden and tests/golden_other, whose READMEs say what they hold, and builds our
tasks from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from albef_ds.config import ModelConfig, TextConfig, VisionConfig
from albef_ds.data.batch import (
    LabelledBatch,
    Loaded,
    MaskedTokens,
    PackedText,
    PairBatch,
    PretrainingBatch,
    QuestionBatch,
)
from albef_ds.model.reference_weights import load_reference
from albef_ds.model.weight_files import read_state_dict
from albef_ds.tasks.nlvr import Assignment
from albef_ds.tasks.registry import TASKS
from albef_ds.tasks.task import Task

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_OTHER = Path(__file__).parent / "golden_other"
FINE_TUNED = ("retrieval", "vqa", "entailment", "nlvr")
# What ships, in full: a file that is lost must not take its test with it.
SHIPPED = {
    GOLDEN: ("pretrain", "pretrain_ddp2", *FINE_TUNED),
    GOLDEN_OTHER: ("pretrain", *FINE_TUNED, "grounding", "text_assignment"),
}
CONTRASTIVE = ("pretraining", "retrieval", "grounding")


def most_likely_negative(logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """The recorded cases take the likeliest candidate where the reference draws one."""
    ids = torch.arange(logits.shape[0], device=logits.device) if ids is None else ids
    return logits.masked_fill(ids[:, None] == ids[None, :], float("-inf")).argmax(1)


@dataclass(frozen=True)
class GoldenCase:
    folder: Path
    name: str

    def __str__(self) -> str:  # what pytest shows
        return f"{self.folder.name}-{self.name}"

    @property
    def is_recorded(self) -> bool:
        return all((self.folder / f"{self.name}{suffix}").is_file() for suffix in (".npz", ".pth"))

    @property
    def source(self) -> str:
        return str(self.folder / f"{self.name}.pth")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{self.name}.npz") as archive:
            return {key: archive[key] for key in archive.files}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The checkpoint before the first step."""
        return read_state_dict(self.source)

    @property
    def task(self) -> str:
        return "pretraining" if self.name.startswith("pretrain") else self.name

    @property
    def steps(self) -> int:
        return len({key.split("/")[0] for key in self.arrays if key.startswith("step")})

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def model_config(self, **changes) -> ModelConfig:
        dims = json.loads((self.folder / "meta.json").read_text())["dims"]
        vision = VisionConfig(
            image_size=dims["res"], patch_size=16, width=dims["width"], layers=dims["depth"], heads=dims["heads"]
        )
        text = TextConfig(
            vocab_size=dims["vocab"],
            width=dims["width"],
            layers=dims["layers"],
            fusion_layer=dims["fusion"],
            heads=dims["heads"],
            mlp_width=dims["inter"],
            max_positions=dims["pos"],
            dropout=0.0,
            attention_dropout=0.0,
        )
        queue_size = self.state["image_queue"].shape[1] if "image_queue" in self.state else dims["queue"]
        return ModelConfig(
            **{"vision": vision, "text": text, "embed_dim": dims["embed"], "queue_size": queue_size} | changes
        )

    def build(self, loss_impl: str = "auto", **changes) -> Task:
        """The task with the recorded weights."""
        special = (most_likely_negative, loss_impl) if self.task in CONTRASTIVE else ()
        task = TASKS[self.task](self.model_config(**changes), *special)
        load_reference(self.state, task.model, task.teacher, getattr(task, "queue", None), self.source)
        return task

    def alpha(self, step: int) -> float:
        return float(self.arrays.get(f"step{step}/alpha", 0.0))  # text assignment has no teacher

    def batch(self, step: int, rank: int | None = None) -> Loaded:
        """What step `step` sees; some cases record one batch for all steps."""
        at = f"step{step}/" if rank is None else f"step{step}/rank{rank}/"
        if f"{at}image" not in self.arrays:
            at = ""
        given = {
            key.removeprefix(at): torch.from_numpy(value)
            for key, value in self.arrays.items()
            if key.startswith(at) and value.ndim and "/" not in key.removeprefix(at)
        }
        return getattr(self, f"_{self.task}")(given)

    def _pretraining(self, given: dict[str, Tensor]) -> PretrainingBatch:
        mask = given["attention_mask"].bool()
        labels = given["labels"][mask]
        positions = (labels != -100).nonzero().flatten()
        counts = (given["labels"] != -100).sum(1).tolist()
        masked = MaskedTokens(given["masked_ids"][mask], positions, labels[positions], tuple(counts))
        return PretrainingBatch(given["image"], packed(given), masked)

    def _retrieval(self, given: dict[str, Tensor]) -> PairBatch:
        return PairBatch(given["image"], packed(given), given["image_id"])

    def _text_assignment(self, given: dict[str, Tensor]) -> PairBatch:
        return PairBatch(given["image"], packed(given), torch.arange(len(given["image"])))

    def assignment(self, step: int) -> Assignment:
        """Which images the reference drew."""
        return Assignment(*(self.tensor(f"step{step}/{name}") for name in ("left", "right", "labels")))

    def _entailment(self, given: dict[str, Tensor]) -> LabelledBatch:
        return LabelledBatch(given["image"], packed(given), given["targets"])

    _nlvr = _entailment

    def _vqa(self, given: dict[str, Tensor]) -> QuestionBatch:
        answers = packed(given, "answer_ids", "answer_mask")
        return QuestionBatch.of(
            given["image"],
            packed(given, "question_ids", "question_mask"),
            answers,
            given["answer_weights"],
            given["answer_counts"].tolist(),
        )

    def losses(self, step: int, rank: int | None = None) -> dict[str, float]:
        at = f"step{step}/" if rank is None else f"step{step}/rank{rank}/"
        names = {"itc": "loss_ita", "itm": "loss_itm", "mlm": "loss_mlm"}
        if f"{at}loss" in self.arrays:
            names = {{"vqa": "answers", "text_assignment": "ta"}.get(self.task, "classes"): "loss"}
        return {ours: float(self.arrays[at + theirs]) for ours, theirs in names.items() if at + theirs in self.arrays}


def packed(given: dict[str, Tensor], ids: str = "input_ids", mask: str = "attention_mask") -> PackedText:
    return PackedText.from_padded(given[ids], given[mask])
