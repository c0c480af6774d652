"""What visual entailment and NLVR2 share: cross-entropy with labels, distilled from the momentum teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from albef_ds.config import ModelConfig
from albef_ds.data.batch import LabelledBatch
from albef_ds.model.albef import at_least_fp32
from albef_ds.model.classifier import Classifier, ClassifierTeacher
from albef_ds.tasks.task import Task


class Classification(Task):
    """A text and its image (or two) to one of C classes."""

    classes: int
    images_per_text = 1

    def __init__(self, config: ModelConfig):
        model = Classifier(config, self.classes, self.images_per_text)
        teacher = ClassifierTeacher(model, config.momentum, config.teacher_dropout) if config.distill else None
        super().__init__(config, model, teacher)

    def forward(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """A micro-batch to {"classes"}: (1 - alpha) * cross-entropy with the labels + alpha * with the teacher."""
        logits = at_least_fp32(self.model.classify(batch.images, batch.text))
        loss = F.cross_entropy(logits, batch.labels)
        if self.teacher is not None:
            with torch.no_grad():
                soft_labels = at_least_fp32(self.teacher.classify(batch.images, batch.text)).softmax(-1)
            loss = (1 - self.alpha) * loss + self.alpha * F.cross_entropy(logits, soft_labels)
        if self.measuring:
            self.measures["accuracy"] = (logits.argmax(-1) == batch.labels).float().mean()
        return {"classes": loss}
