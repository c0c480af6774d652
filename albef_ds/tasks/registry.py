"""The tasks by the names that recipes call them."""

from __future__ import annotations

from albef_ds.tasks.entailment import Entailment
from albef_ds.tasks.nlvr import NLVR, TextAssignment
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.tasks.retrieval import Retrieval
from albef_ds.tasks.task import Task
from albef_ds.tasks.vqa import VQA

TASKS: dict[str, type[Task]] = {
    "pretraining": Pretraining,
    "retrieval": Retrieval,
    "vqa": VQA,
    "entailment": Entailment,
    "text_assignment": TextAssignment,
    "nlvr": NLVR,
    "grounding": Retrieval,  # learnt from pairs alone; where a phrase points comes out of Grad-CAM
}


def task_class(name: str) -> type[Task]:
    return TASKS[name]
