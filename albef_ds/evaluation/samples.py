"""Runs a model over all entries of a test set, divided over the ranks by whole batches; every rank gets every result.

A batch holds the same samples on any number of ranks, so the results are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from albef_ds.data.task_samples import TaskSample, TaskSamples
from albef_ds.evaluation.ahead import EvaluationError, loaded_ahead, refuse_holes
from albef_ds.evaluation.encoding import progress
from albef_ds.evaluation.sharding import Batches, Ranks


def over_ranks(
    samples: TaskSamples, run: Callable[[list[TaskSample]], list], size: int, workers: int, what: str
) -> list:
    """`run` of every batch of `size` samples, one small result a sample, in the order of the entries.

    Raises EvaluationError, on all ranks together, where an image cannot be used or where `run` raises it.
    """
    ranks = Ranks.current()
    batches = Batches(len(samples), size, ranks)
    found, bad, broken = {}, [], []
    loaded = loaded_ahead(lambda row: samples.load(row, None), [batches.rows(b) for b in batches.mine], workers)
    for batch, (block, faults) in zip(batches.mine, progress(loaded, what, ranks, len(batches.mine)), strict=True):
        bad += faults
        if bad or broken:
            continue
        try:
            found[batch] = run(block)
        except EvaluationError as error:  # the others wait for this rank's results: they must learn of it
            broken.append(str(error))
    refuse_holes(ranks, bad)
    parts = ranks.all_objects((found, broken))
    for reason in (reason for _, reasons in parts for reason in reasons):
        raise EvaluationError(reason)
    everything = {batch: results for part, _ in parts for batch, results in part.items()}
    return [result for batch in range(batches.count) for result in everything[batch]]


@contextmanager
def evaluating(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Without dropout and gradients, and with bf16 arithmetic on a GPU, as in training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            yield
    finally:
        model.train(training)
