"""Evaluates between epochs on data.val and keeps the weights that did best there, as the reference does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from albef_ds.evaluation.recipe import Evaluated
from albef_ds.model.reference_weights import load_reference
from albef_ds.model.weight_files import read_state_dict
from albef_ds.training.json_lines import read_lines

log = logging.getLogger(__name__)

HISTORY, BEST = "validation.jsonl", "best.pth"


class Validation:
    """Args:
    out: the run's folder; gets validation.jsonl, and best.pth in the reference's form.
    evaluate: on all ranks together; every rank gets the same result.
    weights: the state dict to keep.
    start_step: of a resumed run: what was found after it is forgotten, and will be found again.
    """

    def __init__(
        self, out: Path, rank: int, evaluate: Callable[[], Evaluated], weights: Callable[[], dict], start_step: int = 0
    ):
        self.out, self.rank, self.evaluate, self.weights = out, rank, evaluate, weights
        self.history = [line for line in read_lines(out / HISTORY) if line["step"] <= start_step]
        if rank == 0 and (out / HISTORY).exists():
            (out / HISTORY).write_text("".join(json.dumps(line) + "\n" for line in self.history), encoding="utf-8")

    @property
    def best(self) -> dict | None:
        """The best line of the history, the first of equal ones."""
        return max(self.history, key=lambda line: line["score"], default=None)

    def after_step(self, step: int) -> None:
        result = self.evaluate()
        if result.score is None:
            raise ValueError("data.val has no labels: leave it out, or name a file with them")
        before = self.best
        self.history.append({"step": step, "score": result.score, "metrics": result.metrics})
        log.info("validation after step %d: %.2f (best so far: %.2f)", step, result.score, self.best["score"])
        if self.rank != 0:
            return
        with open(self.out / HISTORY, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.history[-1]) + "\n")
        if before is None or result.score > before["score"]:
            part = self.out / f"{BEST}.part"
            torch.save({"model": self.weights(), "step": step}, part)
            part.replace(self.out / BEST)


def take_best(out: Path, model: torch.nn.Module) -> dict | None:
    """Loads the weights that validation found best into the model, on all ranks, from rank 0's folder; says which."""
    found: list[dict | None] = [None]
    if dist.get_rank() == 0:
        history = read_lines(out / HISTORY)
        if history:
            best = max(history, key=lambda line: line["score"])
            load_reference(read_state_dict(out / BEST), model, None, None, str(out / BEST))
            found = [{"best_step": best["step"], "score": best["score"], "weights": BEST}]
    dist.broadcast_object_list(found, src=0)
    if found[0] is not None:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
    return found[0]
