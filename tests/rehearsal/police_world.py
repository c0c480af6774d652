"""The models, test sets and pictures that cases on a policed GPU work with, made when first asked for."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import albef_ds
from albef_ds.data.annotations import read_pairs
from albef_ds.data.augment import TrainTransform
from albef_ds.data.batch import PretrainingBatch
from albef_ds.data.order import SampleOrder
from albef_ds.data.text_pipeline import TextPipeline
from albef_ds.data.tokenizer import load_tokenizer, train_wordpiece
from albef_ds.evaluation.recipe import Evaluated, evaluate_recipe
from albef_ds.inference.model import Albef
from albef_ds.inference.teacher_view import LoadedTeacher, load_teacher
from tests.inference.conftest import TEXTS, draw, small_model, write_checkpoint
from tests.rehearsal.policed import GPU
from tests.shapes_recipes import built, write_task_recipe, write_world

ON_THE_CPU = {"device_id": None, "decoder": "cpu"}
ASKED = [text or "what" for text in TEXTS]  # every text has a word


class World:
    """Methods are called within the mode of `policed.install`; what they make stays for the next case."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.evaluated = cache(self._evaluated)
        self.model = cache(self._model)

    def evaluate(self, task: str, freely: bool = False, **settings) -> Evaluated:
        """A random model on its task's test set.

        Args:
            freely: answers are written, not chosen from a list.
            settings: of the recipe's section "evaluation".
        """
        config, tokenizer, model = self.evaluated(task)
        evaluation = config.evaluation.model_copy(update=settings)
        data = config.data.model_copy(update={"answer_list": None} if freely else {})
        config = config.model_copy(update={"evaluation": evaluation, "data": data})
        return evaluate_recipe(model, config, tokenizer, GPU, out=self.folder)

    def _evaluated(self, task: str):
        config, tokenizer, model = built(write_task_recipe(self.folder, task))
        return config, tokenizer, model.to(GPU)

    def _model(self, kind: str, device: str = "cuda") -> Albef:
        return albef_ds.load(self.checkpoint(kind), device=device)

    def teacher(self) -> LoadedTeacher:
        return load_teacher(self.checkpoint("pretraining"), device="cuda")

    def checkpoint(self, kind: str) -> Path:
        path, vocabulary = self.folder / f"{kind}.pth", self.folder / "vocab.txt"
        if not vocabulary.exists():
            train_wordpiece([text for text in TEXTS if text] * 3, 120, vocabulary)
        if not path.exists():
            write_checkpoint(kind, path, small_model(load_tokenizer(vocabulary).vocab_size))
        return path

    def dali_batches(self, device: torch.device, count: int) -> list[PretrainingBatch]:
        """Of DALI's loader; the pipeline of a GPU runs with the CPU's decoder."""
        from nvidia.dali.plugin import pytorch

        from albef_ds.data import dali, dali_pipeline

        data, define = write_world(self.folder)[0], dali_pipeline.define
        pairs, tokenizer = read_pairs(data.train, data.root), load_tokenizer(data.vocab)
        order = SampleOrder(len(pairs), micro_batch=8)
        with (
            mock.patch.object(dali_pipeline, "define", lambda **asked: define(**asked | ON_THE_CPU)),
            mock.patch.object(dali, "ahead", lambda make, depth: make()),  # a thread is not within the mode
            mock.patch.object(pytorch, "feed_ndarray", _feed_ndarray),
        ):
            loader = dali.DaliLoader(pairs, TextPipeline(tokenizer), TrainTransform(32), order, device=device)
            batches = loader.batches()
            try:
                return list(islice(batches, count))
            finally:
                batches.close()

    @property
    def pictures(self) -> list[Image.Image]:
        """As many as TEXTS."""
        shown = (("red", "circle"), ("blue", "square"), ("green", "circle"), ("black", "square"), ("red", "square"))
        return [draw(colour, shape) for colour, shape in shown]

    @property
    def files(self) -> Path:
        """The pictures as a folder of files."""
        folder = self.folder / "pictures"
        folder.mkdir(exist_ok=True)
        for number, picture in enumerate(self.pictures):
            picture.save(folder / f"{number}.png")
        return folder


def _feed_ndarray(images, into: torch.Tensor, cuda_stream) -> None:
    """DALI's copies to an address, which a tensor of policed.py has not."""
    into.copy_(torch.from_numpy(np.array(images)))
