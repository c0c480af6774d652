"""Steps broken on purpose, to show that the rehearsal notices: a case, what is done to it, and what must be said."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from unittest import mock

import torch

from albef_ds.data.batch import LabelledBatch
from albef_ds.model import attention
from albef_ds.model.queue import FeatureQueue
from albef_ds.model.text import BertEmbeddings, Intermediate
from albef_ds.tasks.entailment import Entailment
from tests.rehearsal.cases import LENGTHS, Case


@dataclass(frozen=True)
class Plant:
    """`said` is a regular expression of the error that must come."""

    name: str
    said: str
    broken: Callable[[], AbstractContextManager]
    case: Case = Case("entailment", "flash")

    def caught(self, error: str) -> bool:
        return re.search(self.said, error) is not None


def _around(owner: type, name: str, change: Callable) -> Callable[[], AbstractContextManager]:
    """Has `change(original, self, *args)` called in place of a method."""
    original = getattr(owner, name)

    @wraps(original)
    def changed(self, *args):
        return change(original, self, *args)

    return lambda: mock.patch.object(owner, name, changed)


def _first(look: Callable[[LabelledBatch], object]) -> Callable[[], AbstractContextManager]:
    """Entailment's step, begun with a look at the batch."""

    def change(forward, task, batch):
        look(batch)
        return forward(task, batch)

    return _around(Entailment, "forward", change)


def _labels_on_the_host(forward, task, batch):
    return forward(task, replace(batch, labels=torch.zeros(len(batch), dtype=torch.int64)))


def _pointer_on_the_host(enqueue, queue, *features):
    queue.pointer = torch.zeros(1, dtype=torch.int64)
    return enqueue(queue, *features)


def _detached(forward, embeddings, *ids):
    return forward(embeddings, *ids).detach()


def _half(forward, task, batch):
    return {name: loss.bfloat16() for name, loss in forward(task, batch).items()}


def _broken_graph(forward, layer, x):
    torch._dynamo.graph_break()
    return forward(layer, x)


def _by_length(forward, layer, x):
    return forward(layer, x + 0 if x.shape[0] == sum(LENGTHS[1]) else x)  # the tokens of the second step


def _multiply_mixed(batch: LabelledBatch) -> None:
    with torch.autocast("cuda", enabled=False):
        batch.images[0, 0].float() @ batch.images[0, 0].bfloat16()


def _set_first(batch: LabelledBatch) -> None:
    batch.labels[0] = 1  # a number by itself is copied from the host; batch.labels[:1] = 1 is filled in


def _flash(cast: torch.dtype | None = None, **options) -> Callable[[], AbstractContextManager]:
    """flash-attn called with further arguments, or on tensors of another dtype."""

    def start() -> AbstractContextManager:
        import flash_attn

        original = flash_attn.flash_attn_varlen_func

        def changed(q, k, v, *args, **kwargs):
            q, k, v = (x.to(cast) if cast else x for x in (q, k, v))
            return original(q, k, v, *args, **kwargs, **options)

        return mock.patch.object(flash_attn, "flash_attn_varlen_func", changed)

    return start


def _varlen(**options) -> Callable[[], AbstractContextManager]:
    def start() -> AbstractContextManager:
        from torch.nn.attention import varlen

        original = varlen.varlen_attn
        return mock.patch.object(varlen, "varlen_attn", lambda *a, **k: original(*a, **k, **options))

    return start


READ, SHAPE = r"DataDependentOutputException.*_local_scalar_dense", r"DynamicOutputShapeException.*nonzero"
COMPILED = Case("entailment", "flash", compiled=True)

PLANTS = (
    Plant("item", READ, _first(lambda batch: batch.labels.max().item())),
    Plant("if", READ, _first(lambda batch: 1 if batch.labels.any() else 0)),
    Plant("boolean index", SHAPE, _first(lambda batch: batch.images[batch.labels > 0])),
    Plant("index on the host", "Waits: an index .* lies on the host", _first(lambda b: b.images[torch.tensor([0])])),
    Plant("unpinned", "Waits: a copy .* not pinned", _first(lambda b: torch.ones(4).to("cuda", non_blocking=True))),
    Plant("blocking", "Waits: a copy .* without non_blocking", _first(lambda b: torch.ones(4).pin_memory().cuda())),
    Plant("to the host", "Waits: a copy .* to cpu", _first(lambda batch: batch.labels.cpu())),
    Plant("element", "Waits: a copy .* not pinned", _first(_set_first)),
    Plant("synchronize", "Waits: synchronize", _first(lambda batch: torch.cuda.synchronize())),
    Plant("forgotten field", "two different devices", _around(Entailment, "forward", _labels_on_the_host)),
    Plant(
        "forgotten buffer",
        r"Refused: aten.index_copy_.*on cuda with an index of int64 \[4\] on cpu",
        _around(FeatureQueue, "enqueue", _pointer_on_the_host),
        Case("retrieval", "flash"),
    ),
    Plant("flash keyword", "TypeError.*unexpected keyword argument 'dropout'", _flash(dropout=0.1)),
    Plant("varlen keyword", "TypeError.*'causal'", _varlen(causal=True), Case("entailment", "varlen", dropout=0.0)),
    Plant("flash in fp32", "Refused: flash-attn knows fp16 and bf16 alone", _flash(cast=torch.float32)),
    Plant(
        "dropout on packed rows",
        "Refused: memory-efficient attention drops out other",
        lambda: mock.patch.object(attention, "reads_packed", lambda backend, dropout: True),
        Case("entailment", "efficient"),
    ),
    Plant("mixed dtypes", "Refused: aten.mm", _first(_multiply_mixed)),
    Plant(
        "loss in bf16", "AssertionError: the loss classes is in torch.bfloat16", _around(Entailment, "forward", _half)
    ),
    Plant(
        "no gradient", "AssertionError: .*embeddings.* has no gradient", _around(BertEmbeddings, "forward", _detached)
    ),
    Plant("graph break", "Unsupported.*[Gg]raph.break", _around(Intermediate, "forward", _broken_graph), COMPILED),
    Plant("recompilation", "RecompileError", _around(Intermediate, "forward", _by_length), COMPILED),
)
