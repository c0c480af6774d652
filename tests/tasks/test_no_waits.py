"""No step of pre-training or retrieval asks its device for anything, with the options that change the batch too.

A GPU is stood in for by torch's "meta" device, whose tensors have shapes and no values: to read one, or to make a shape
that depends on values, is an error there, and would be a wait on a GPU. So would a copy from pageable host memory be.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from albef_ds.config import OptionsConfig
from albef_ds.data.batch import PackedText, PairBatch
from albef_ds.tasks import negatives
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.tasks.retrieval import Retrieval
from tests.tiny import tiny_batch, tiny_model

OPTIONS = {"none": {}, "mixgen": {"mixgen": 0.25}, "negatives": {"negatives": "all"}}
OPTIONS["both"] = OPTIONS["mixgen"] | OPTIONS["negatives"]


class Uploads(TorchDispatchMode):
    """Counts copies from the host to the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            self.count += source.is_cpu and found.is_meta
        return found


@contextmanager
def made_up_ranks(said: list[torch.Tensor]):
    """Two ranks, of which the other says nothing; `said`: what this one tells by way of the hosts."""

    class Done:
        def wait(self) -> None:
            pass

    def all_reduce(tensor, *_, **__):
        said.append(tensor)
        return Done()

    stand_ins = {
        "is_initialized": lambda: True,
        "get_world_size": lambda *_: 2,
        "get_rank": lambda *_: 0,
        "all_gather_into_tensor": lambda *_, **__: None,
        "reduce_scatter_tensor": lambda *_, **__: None,
        "all_reduce": all_reduce,
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(dist, name, stand_in))
        stack.enter_context(mock.patch.object(negatives, "hosts", lambda world: None))
        yield


@contextmanager
def autocast_known_to_meta():
    autocast = torch.autocast
    with mock.patch.object(
        torch, "autocast", lambda d, *a, **k: nullcontext() if d == "meta" else autocast(d, *a, **k)
    ):
        yield


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", [Pretraining, Retrieval])
def test_a_step_asks_its_device_for_nothing(kind, options):
    task = kind(tiny_model(options=OptionsConfig(**OPTIONS[options]))).to("meta")
    batch = tiny_batch(6, lengths=[2, 1, 4, 3, 7, 9], labelled=0.6)
    if kind is Retrieval:
        batch = PairBatch(batch.images, batch.text, torch.arange(6))
    batch, said = batch.to("meta"), []
    ranks = made_up_ranks(said) if "negatives" in OPTIONS[options] else nullcontext()
    with ranks, autocast_known_to_meta(), Uploads() as uploads:
        task.start_step(0.4)
        losses = task(batch)
        sum(losses.values()).backward()
        task.finish_step()
    assert uploads.count == 0
    assert all(loss.is_meta for loss in losses.values()) and len(losses) >= 2
    assert all(p.grad is not None and p.grad.is_meta for p in task.model.parameters())
    assert all(tensor.is_cpu for tensor in said) and len(said) == ("negatives" in OPTIONS[options])


def test_texts_are_selected_by_the_hosts_numbers_alone():
    texts = [[2, 7, 3], [2, 8], [2], [2, 5, 6, 9]]
    index = [3, 0, 0, 2]
    found, expected = (
        PackedText.from_lists(texts).to("meta").select(index),
        PackedText.from_lists([texts[i] for i in index]),
    )
    assert found.lengths == expected.lengths == (4, 3, 3, 1)
    for name in ("input_ids", "position_ids", "cu_seqlens"):
        tensor, wanted = getattr(found, name), getattr(expected, name)
        assert tensor.is_meta and (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype)
