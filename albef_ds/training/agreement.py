"""What the ranks agree on: what rank 0 finds on the disk, and once a step whether one was asked to end, whether one
could not save, and the loss where spikes are watched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from albef_ds.folder_lock import FolderError, FolderLock
from albef_ds.training.checkpoint_writer import finish_writing

Found = TypeVar("Found")


def from_rank_zero(action: Callable[[], Found], *errors: type[Exception]) -> Found:
    """Runs `action` on rank 0 alone; every rank gets what it returns, which must be picklable. Collective.

    Raises:
        errors: the first of them that fits what it raised, with its message, on every rank; `told_by_rank_0` is set:
            for one to tell it is enough.
    """
    answer: list = [None, None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except errors as error:
            kind = next(i for i, fits in enumerate(errors) if isinstance(error, fits))
            answer[1:] = kind, str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        error = errors[answer[1]](answer[2])
        error.told_by_rank_0 = True
        raise error
    return answer[0]


def hold(folder: Path, held: ExitStack) -> None:
    """Rank 0 locks the folder for all of its run, until `held` ends. Collective. Raises FolderError."""

    def take() -> None:
        lock = held.enter_context(FolderLock(folder))
        held.callback(lambda: setattr(lock, "until_the_end", not finish_writing()))  # before the lock is given up

    from_rank_zero(take, FolderError)


@dataclass(frozen=True)
class Agreed:
    """The same on every rank."""

    stop: bool
    saving_failed: bool
    loss: float | None  # mean over the ranks, of two steps ago; None before there is one, or where it is not watched


class Agreement:
    """One sum of three numbers over a gloo group of its own, between hosts: no GPU knows of it, and none waits for it.

    What a rank says at the end of a step is read by all at the end of the next one, when it has long arrived. A loss
    is copied to the host while the next step computes and so is said a step later still. Collective to make and to use.
    """

    def __init__(self):
        self.world_size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self._pending: tuple[Tensor, dist.Work | None, bool] | None = None
        self._loss: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, stop: bool, saving_failed: bool, loss: Tensor | None = None) -> Agreed:
        """Says what this rank has to say at the end of this step; returns what all said at the end of the last.

        Args:
            loss: this rank's, 0-d on any device; given at every step, or at none.
        """
        agreed = self._received()
        before = self._read_loss()
        loss_said = 0.0 if before is None else before
        said = torch.tensor([float(stop), float(saving_failed), loss_said], dtype=torch.float64)
        work = dist.all_reduce(said, group=self._group, async_op=True) if self._group is not None else None
        self._pending = (said, work, before is not None)
        self._loss = None if loss is None else _copy_to_host(loss)
        return agreed

    def close(self) -> None:
        """Waits for what is still under way, so that no rank leaves in the middle of it."""
        self._received()
        self._pending = self._loss = None

    def _received(self) -> Agreed:
        if self._pending is None:
            return Agreed(False, False, None)
        said, work, with_loss = self._pending
        if work is not None:
            work.wait()
        stop, failed, loss = said.tolist()
        return Agreed(stop > 0, failed > 0, loss / self.world_size if with_loss else None)

    def _read_loss(self) -> float | None:
        if self._loss is None:
            return None
        value, copied = self._loss
        if copied is not None:
            copied.synchronize()  # a step ago: DeepSpeed has waited for later things since
        return float(value)


def _copy_to_host(loss: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    loss = loss.detach()
    if loss.device.type != "cuda":
        return loss.clone(), None
    host = torch.empty((), dtype=loss.dtype, pin_memory=True)
    host.copy_(loss, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
