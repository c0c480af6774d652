"""Counts the floating-point operations that a step executes: a run's MFU, `--dry-run` and the benchmarks ask here.

PyTorch's counter knows matrix products and most of its own attention. What it does not know stands here: attention on a
CPU, attention on packed rows (flash-attn's operators, torch's copy of them, and its memory-efficient kernel, of which
PyTorch counts the padding too), and our contrastive loss, which is one operator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import albef_ds.kernels  # noqa: F401  (registers our operators)
from albef_ds import optional

aten = torch.ops.aten

# Operators on packed rows, and their matrix products: backward makes the scores a second time.
PACKED_ATTENTION = {
    "flash_attn::_flash_attn_varlen_forward": 2,
    "flash_attn::_flash_attn_varlen_backward": 5,
    "torch_attn::_varlen_attn": 2,
    "torch_attn::_varlen_attn_backward": 5,
    "aten::_flash_attention_forward": 2,
    "aten::_flash_attention_backward": 5,
    "aten::_efficient_attention_forward": 2,
    "aten::_efficient_attention_backward": 5,
}


class FlopCount(FlopCounterMode):
    """Context manager; `total` is the number of FLOPs executed inside, a multiply-add being two.

    Of real tensors on a GPU it reads how long the packed runs are, which waits for the device: a run counts its first
    step alone.
    """

    def __init__(self):
        super().__init__(display=False, custom_mapping=_known())

    @property
    def total(self) -> int:
        return self.get_total_flops()


def _known() -> dict:
    """{operator: its count}, of the operators that are there."""
    found = {
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
        torch.ops.albef_ds.queue_contrastive: _contrastive,
    }
    _register_optional()
    for name, products in PACKED_ATTENTION.items():
        namespace, operator = name.split("::")
        if hasattr(getattr(torch.ops, namespace), operator):
            packet = getattr(getattr(torch.ops, namespace), operator)
            found[packet] = _packed(packet, products)
    return found


def _register_optional() -> None:
    """Operators are registered by the import, which otherwise comes with the first forward pass."""
    try:
        if optional.find("varlen").available:
            import torch.nn.attention.varlen  # noqa: F401
        if optional.find("flash-attn").available:
            import flash_attn  # noqa: F401
    except Exception:  # a build that fails cannot be chosen for attention either, and is named there
        return


def _cpu_forward(q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_backward(grad, q, k, v, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _contrastive(image_feat, text_feat, image_feat_m, text_feat_m, image_queue, *args, out_shape=None, **kwargs) -> int:
    """Both directions: the model's and the teacher's logits, and the gradient to the features; the Triton kernels make
    the two logits a second time for the gradient."""
    (batch, dim), length = image_feat, image_queue[0]
    with_grad, impl = args[-2:]
    products = 2 if not with_grad else 5 if impl == "triton" else 3
    return 2 * products * 2 * batch * (batch + length) * dim


def _packed(operator, products: int) -> Callable[..., int]:
    names = [argument.name for argument in operator.default._schema.arguments]

    def count(*args, out_val=None, **kwargs) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs

        def of(*spellings: str) -> Tensor:
            return next(given[name] for name in spellings if name in given)

        q, k = of("q", "query"), of("k", "key")
        cu_q, cu_k = of("cu_seqlens_q", "cu_seq_q", "cum_seq_q"), of("cu_seqlens_k", "cu_seq_k", "cum_seq_k")
        pairs = query_key_pairs(cu_q, cu_k, q.shape[-3], k.shape[-3])
        return round(2 * products * pairs * q.shape[-2] * q.shape[-1])

    count._get_raw = True  # PyTorch's counter hands over tensors, not their shapes alone
    return count


def query_key_pairs(cu_q: Tensor, cu_k: Tensor, q_rows: int, k_rows: int) -> float:
    """How many rows look at how many: the sum over runs of queries times keys.

    Tensors without values do not tell how long a run is: all keys count as equally long there, as an image's are.

    Args:
        cu_q, cu_k: [N + 1] bounds of the runs.
        q_rows, k_rows: rows in all.
    """
    if isinstance(cu_q, FakeTensor) or cu_q.is_meta:
        return q_rows * k_rows / (cu_k.numel() - 1)
    return (cu_q.long().diff() * cu_k.long().diff()).sum().item()
