"""What the police lets pass and what it refuses, case by case as CUDA does: (name, what is done, refused with)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TWO = "at least two devices, cuda:0 and cpu"


def _numbers(device: str) -> Tensor:
    return torch.arange(12.0, device=device).view(3, 4)


def _rule(use: Callable[[Tensor, Tensor], object], gives: Callable[[Tensor, Tensor], object] | None = None):
    """`use(there, here)`; what it gives has to be what `gives(here, here)`, the same without a GPU, gives."""

    def run(world: object) -> object:
        found = use(_numbers("cuda"), _numbers("cpu"))
        if gives is None:
            return found
        expected = gives(_numbers("cpu"), _numbers("cpu"))
        found = found.cpu() if isinstance(found, Tensor) else found
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)), found
        return found

    return run


def _same(use: Callable[[Tensor, Tensor], object]):
    return _rule(use, use)


def _put(at: object, value: Tensor):
    def put(there: Tensor, here: Tensor) -> Tensor:
        there[at] = value
        return there

    return put


ROWS = torch.tensor([2, 0])
RULES = (
    ("tensors on the GPU compute", _same(lambda there, here: (there @ there.T + 1).softmax(-1)), None),
    ("what is changed in place is the same tensor", _same(lambda there, here: there[1].add_(5) + there[1]), None),
    ("a copy to the GPU", _rule(lambda there, here: there + here.to("cuda"), lambda there, here: 2 * here), None),
    ("a copy to the host", _rule(lambda there, here: there.cpu() + here, lambda there, here: 2 * here), None),
    ("copy_ both ways", _same(lambda there, here: here.copy_(there.copy_(here + 1))), None),
    (
        "torch.tensor on the GPU",
        _rule(lambda there, here: torch.tensor(3.0, device="cuda").is_cuda, lambda *_: True),
        None,
    ),
    ("a read by the host", _same(lambda there, here: there.sum().item() + there[1].tolist()[0]), None),
    ("a number on the host, elementwise", _same(lambda there, here: there * torch.tensor(2.0)), None),
    ("a number on the host where one is chosen", _same(lambda t, _: torch.where(t > 3, t, torch.tensor(0.0))), None),
    ("a number on the host into brackets", _same(_put(ROWS, torch.tensor(7.0))), None),
    ("a row of the host's into brackets, which is a copy", _same(_put(1, torch.ones(4))), None),
    ("an index on the host by brackets", _same(lambda there, here: there[ROWS]), None),
    ("a mask on the host by brackets", _same(lambda there, here: there[here > 4]), None),
    ("elementwise", _rule(lambda there, here: there + here), TWO),
    ("a number on the GPU beside the host's tensor", _rule(lambda there, here: there.sum() + here), TWO),
    ("into a number on the host", _rule(lambda there, here: torch.tensor(1.0).add_(there.sum())), TWO),
    ("a product", _rule(lambda there, here: F.linear(there, here)), TWO),
    ("cat", _rule(lambda there, here: torch.cat([there, here])), TWO),
    ("equal", _rule(lambda there, here: torch.equal(there, here)), TWO),
    ("a mask on the host", _rule(lambda there, here: there.masked_fill(here > 4, 0.0)), TWO),
    ("values on the host into brackets", _rule(_put(ROWS, torch.ones(4))), TWO),
    (
        "a host's tensor indexed from the GPU",
        _rule(lambda _, here: here[ROWS.to("cuda")]),
        "indices should be either on cpu",
    ),
    ("embedding of the host's index", _rule(lambda there, here: F.embedding(ROWS, there)), TWO),
    ("index_select of the host's index", _rule(lambda there, here: there.index_select(0, ROWS)), TWO),
    ("index_select of one place", _rule(lambda there, here: there.index_select(0, torch.tensor(1))), TWO),
    ("gather of the host's index", _rule(lambda there, here: there.gather(0, here.long().clamp(max=2))), TWO),
    ("searchsorted", _rule(lambda there, here: torch.searchsorted(there[0], here)), TWO),
    ("the host's labels", _rule(lambda there, here: F.cross_entropy(there, ROWS.new_zeros(3))), TWO),
    ("from numpy", _rule(lambda there, here: there - torch.from_numpy(np.ones((3, 4), np.float32))), TWO),
    ("numpy()", _rule(lambda there, here: there.numpy()), "can't convert cuda:0 device type tensor to numpy"),
    ("np.asarray", _rule(lambda there, here: np.asarray(there)), "can't convert cuda:0 device type tensor to numpy"),
)
