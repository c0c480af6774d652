"""Runs a function in real processes that form a gloo group, as the launcher would start them."""

from __future__ import annotations

import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable
from unittest import mock

import torch
import torch.multiprocessing as mp

from albef_ds.training.rendezvous import free_port


def run_ranks(world_size: int, function: Callable, *args, timeout: float = 240.0) -> list:
    """function(*args) on every rank; returns what each returned. A rank's exception or death fails the call."""
    context = mp.get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, function, args, results), daemon=True)
        for rank in range(world_size)
    ]
    # They inherit it: a machine's GPU, which ranks cannot share under NCCL, is not seen from their first import on.
    with mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}):
        for process in processes:
            process.start()
    found: dict[int, object] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(found) < world_size:
            try:
                rank, value, error = results.get(timeout=1)
            except queue.Empty:
                dead = [i for i, p in enumerate(processes) if p.exitcode not in (None, 0) and i not in found]
                if dead and results.empty():
                    raise RuntimeError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}") from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{world_size} ranks did not finish within {timeout} s") from None
                continue
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            found[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(timeout=10) if len(found) == world_size else process.kill()
    return [found[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, port: int, function: Callable, args: tuple, results) -> None:
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    torch.set_num_threads(1)
    try:
        # As plain bytes: tensors sent as they are would live in a process that ends before they are read.
        value, error = pickle.dumps(function(*args)), None
    except BaseException:
        value, error = None, traceback.format_exc()
    results.put((rank, value, error))
    results.close()
    results.join_thread()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
