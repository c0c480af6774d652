"""Keeps the next batch on its way to the device while the step computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from albef_ds.data.batch import Movable


def on_device(batches: Iterator[Movable], device: torch.device) -> Iterator[Movable]:
    """Yields each batch on `device`, copied one ahead on a stream of its own; on the CPU they pass through."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copy():
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch.to(device)

    following = copy()
    while following is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
        batch = following
        # The allocator must not hand this memory to the copying stream while the step still reads it.
        batch.record_stream(torch.cuda.current_stream(device))
        following = copy()
        yield batch
