"""What an operator of PyTorch does on a GPU: how many kernels it launches, and the bytes that it moves.

An operator reads what it is given once and writes what it makes once, as a kernel that caches serve well does. It
launches one kernel, save for those below, as PyTorch 2.11 and flash-attn 2.8 are written. What cuDNN makes of attention
and convolutions and cuBLAS of a product is theirs to choose: one each. Memory that is set (cudaMemset) is no kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch._ops import OpOverload

from benchmarks.fake_streams import tensors_in, written_arguments

# Operators that make no kernel run: views by another name, and memory without values.
FREE = set(
    "_reshape_alias _unsafe_view alias detach empty empty_like empty_strided lift_fresh new_empty new_empty_strided "
    "set_ resize_ sym_size is_same_size _fused_sdp_choice".split()
)
KERNELS = {
    "native_layer_norm_backward": 2,  # input; weight and bias
    "flash_attn::_flash_attn_varlen_backward": 3,  # result times its gradient; all three gradients; dq to its dtype
    "_flash_attention_backward": 3,
    "torch_attn::_varlen_attn_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
    "_efficient_attention_backward": 3,
    "convolution_backward": 3,  # input or layout, weight, bias
    # Zeros, or a copy, and then what the name says.
    **dict.fromkeys(("select_backward", "slice_backward", "nll_loss_backward", "constant_pad_nd"), 2),
    **dict.fromkeys(("index_add", "index_put", "index_copy", "scatter", "scatter_add"), 2),
    "cumsum": 2,
    "sort": 3,
}
# Lists of tensors that one kernel takes, by the lists' number; then the most tensors and blocks of a launch, and the
# elements of a block (ATen/native/cuda/MultiTensorApply.cuh).
LISTS = {"_foreach_add_": 1, "_foreach_lerp_": 2, "_fused_adamw_": 4}
MOST_TENSORS, MOST_BLOCKS, CHUNK = {1: 110, 2: 64, 3: 48, 4: 36}, 320, 65536
CAT = 128  # inputs of one launch, if their dtypes are alike
FEW_INDICES = 3072  # of a lookup whose gradient is added up without sorting them

FILLED = {"copy_", "fill_", "zero_", "exponential_", "bernoulli_", "normal_", "uniform_", "random_"}  # written, unread
WRITTEN = {"flash_attn::_flash_attn_varlen_backward": {"dq", "dk", "dv"}}  # arguments written and unread
GATHERS = {"index_select", "embedding", "index", "gather"}  # of the source only the wanted rows are read
SCATTERS = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_"}  # of the target only these rows are written
ADDED = {"index_add_", "scatter_add_"}  # and read
INDICES = ("index", "indices")


def kernels_of(operator: str, given: dict) -> int:
    """Kernels that it launches.

    Args:
        operator: its name, of aten.
        given: its arguments by their names.
    """
    if operator in LISTS:
        return _multi_tensor(next(iter(given.values())), MOST_TENSORS[LISTS[operator]])
    if operator == "cat":
        tensors = given["tensors"]
        alike = len({tensor.dtype for tensor in tensors}) == 1
        return math.ceil(len(tensors) / CAT) if alike else len(tensors)
    if operator == "convolution":
        return 1 if given["bias"] is None else 2
    if operator == "embedding_dense_backward":
        return 2 if given["indices"].numel() <= FEW_INDICES else 5
    return KERNELS.get(operator, 1)


def _multi_tensor(tensors: list[Tensor], most: int) -> int:
    """Launches of multi_tensor_apply: each takes whole tensors and chunks of one until it is full of either."""
    launches = blocks = held = 0
    for tensor in tensors:
        chunks = -(-tensor.numel() // CHUNK)
        held += chunks > 0
        for chunk in range(1, chunks + 1):
            blocks += 1
            if blocks == MOST_BLOCKS or (held == most and chunk == chunks):
                launches, blocks, held = launches + 1, 0, int(chunk < chunks)
    return launches + (blocks > 0)


def bytes_of(func: OpOverload, operator: str, given: dict, result) -> int:
    """Bytes read and written."""
    made = list(tensors_in(result))
    if operator in GATHERS or operator in SCATTERS or operator in ADDED:
        indices = [tensor for name in INDICES for tensor in tensors_in(given.get(name))]
        others = [value for name, value in given.items() if name not in INDICES]
        rows = made if operator in GATHERS else list(tensors_in(others))[1:]  # what is put there; not the target
        if not rows:  # one number into all of them
            rows = [next(tensors_in(others)).new_empty(tensor.shape) for tensor in indices]
        passes = 3 if operator in ADDED or given.get("accumulate") else 2
        return passes * total(rows) + total(indices)
    if operator in ("nll_loss_forward", "nll_loss_backward"):  # of each row one number, whatever its length
        target = given["target"]
        return target.numel() * given["self"].element_size() + distinct(target) + total(made)
    names = changed(func, operator)
    written = list(tensors_in([given.get(name) for name in names]))
    # Arguments that hold nothing yet: by convention those called "out".
    empty = names if operator in FILLED else names & ({"out"} | WRITTEN.get(operator, set()))
    read = {id(tensor): tensor for tensor in tensors_in([given[name] for name in given if name not in empty])}
    return total(read.values()) + total(written) + total(_fresh(func, result))


def changed(func: OpOverload, operator: str) -> set[str]:
    """The names of the arguments that it writes into."""
    names = {key for key in written_arguments(func) or () if isinstance(key, str)}
    return names - {"grads"} if operator == "_fused_adamw_" else names  # written only where they are unscaled


def _fresh(func: OpOverload, result) -> Iterator[Tensor]:
    """Results that are not arguments."""
    returns = func._schema.returns
    for declared, value in zip(returns, result if len(returns) > 1 else [result], strict=False):
        if declared.alias_info is None:
            yield from tensors_in(value)


def total(tensors: Iterable[Tensor]) -> int:
    return sum(map(distinct, tensors))


def distinct(tensor: Tensor) -> int:
    """Bytes of a tensor, elements that an expanded dimension repeats counted once."""
    repeated = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride == 0 and size > 1)
    return tensor.numel() // math.prod(repeated) * tensor.element_size()


def by_name(func: OpOverload, args: tuple, kwargs: dict) -> dict:
    """An operator's arguments by the names of its schema."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs
