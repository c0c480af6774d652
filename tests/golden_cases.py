"""Reads the recorded cases of tests/golden (its README says what they hold) and builds our task from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from albef_ds.config import ModelConfig, TextConfig, VisionConfig
from albef_ds.data.batch import MaskedTokens, PackedText, PretrainingBatch
from albef_ds.model.reference_weights import load_reference, read_state_dict
from albef_ds.tasks.pretraining import Pretraining

GOLDEN = Path(__file__).parent / "golden"


def most_likely_negative(logits: torch.Tensor) -> torch.Tensor:
    """The recorded cases take the likeliest candidate where the reference draws one."""
    diagonal = torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
    return logits.masked_fill(diagonal, float("-inf")).argmax(1)


@dataclass(frozen=True)
class GoldenCase:
    folder: Path
    name: str

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / f"{self.name}.npz") as archive:
            return {key: archive[key] for key in archive.files}

    @property
    def steps(self) -> int:
        return len({key.split("/")[0] for key in self.arrays if key.startswith("step")})

    def model_config(self, **changes) -> ModelConfig:
        dims = json.loads((self.folder / "meta.json").read_text())["dims"]
        state = read_state_dict(self.folder / f"{self.name}.pth")
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
        queue_size = state["image_queue"].shape[1]
        return ModelConfig(
            **{"vision": vision, "text": text, "embed_dim": dims["embed"], "queue_size": queue_size} | changes
        )

    def build(self, loss_impl: str = "auto", **changes) -> Pretraining:
        task = Pretraining(self.model_config(**changes), most_likely_negative, loss_impl)
        path = self.folder / f"{self.name}.pth"
        load_reference(read_state_dict(path), task.model, task.teacher, task.queue, str(path))
        return task

    def alpha(self, step: int) -> float:
        return float(self.arrays[f"step{step}/alpha"])

    def batch(self, step: int, rank: int | None = None) -> PretrainingBatch:
        at = f"step{step}/" if rank is None else f"step{step}/rank{rank}/"
        given = {k.removeprefix(at): torch.from_numpy(v) for k, v in self.arrays.items() if k.startswith(at) and v.ndim}
        mask = given["attention_mask"].bool()
        labels = given["labels"][mask]
        positions = (labels != -100).nonzero().flatten()
        masked = MaskedTokens(given["masked_ids"][mask], positions, labels[positions])
        return PretrainingBatch(given["image"], PackedText.from_padded(given["input_ids"], mask), masked)

    def losses(self, step: int, rank: int | None = None) -> dict[str, float]:
        at = f"step{step}/" if rank is None else f"step{step}/rank{rank}/"
        names = {"itc": "loss_ita", "itm": "loss_itm", "mlm": "loss_mlm"}
        return {ours: float(self.arrays[at + theirs]) for ours, theirs in names.items()}
