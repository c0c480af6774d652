"""Counts the floating-point operations that a step executes."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

# PyTorch's counter knows the attention operators of a GPU only; the CPU's would count as nothing.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class FlopCount(FlopCounterMode):
    """Context manager; `total` is the number of FLOPs executed inside, a multiply-add being two."""

    def __init__(self):
        super().__init__(display=False, custom_mapping=CPU_ATTENTION)

    @property
    def total(self) -> int:
        return self.get_total_flops()
