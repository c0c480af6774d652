"""The random number generators of a process: kept with a checkpoint, or derived anew for another number of ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

_RESUMED = 5  # first word of the seed: data/order.py and shard_order.py have 1 to 4


def random_state() -> dict:
    """All generators that a step may draw from, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def restore_random_state(state: Mapping) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002


def derive_random_state(seed: int, step: int, world_size: int, rank: int) -> None:
    """Seeds all generators from where the run is: a rank that did not exist before has no state to go on from."""
    words = np.random.SeedSequence((_RESUMED, seed, step, world_size, rank)).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)  # noqa: NPY002
    torch.manual_seed(int(words[2]))  # the GPU's generator too
