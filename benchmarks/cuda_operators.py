"""What an operator of PyTorch does on a GPU: how many kernels it launches, and the bytes that it moves.

An operator reads what it is given once and writes what it makes once, as a kernel that caches serve well does. It
launches one kernel, save for those below, as PyTorch 2.11 and flash-attn 2.8 are written. What cuDNN makes of attention
and convolutions and cuBLAS of a product is theirs to choose: one each. Memory that is set, or copied as it lies
(cudaMemset, cudaMemcpy), is no kernel, and its bytes count.

Tensors without values are a subclass, and the gradients of lookups take another way for these: they add to a copy of
the zeros where a GPU's add in place. `as_on_gpu` gives such an operator the name that a GPU would see.
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
    "_scaled_dot_product_flash_attention_backward": 3,
    "torch_attn::_varlen_attn_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
    "_efficient_attention_backward": 3,
    "nll_loss_backward": 2,  # zeros; each row's number
    "_local_scalar_dense": 0,  # a copy to the host
}
MOST_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # of a launch of multi_tensor_apply, by the number of its lists
WITH_SCALARS = 96  # in place of 110, where each has a number of its own
MOST_BLOCKS, CHUNK = 320, 65536  # of a launch; elements of a block (ATen/native/cuda/MultiTensorApply.cuh)
ADAM_LISTS = 4  # weights, gradients, both averages; the steps' numbers come along
CAT = 128  # inputs of one launch, if their dtypes are alike
FEW_INDICES = 3072  # of a lookup whose gradient is added up without sorting them

COPIES = {"copy_", "clone", "_to_copy"}
ON_A_COPY = {"index_add", "index_copy", "index_put", "scatter", "scatter_add"}  # then what the name in place does
IN_PLACE = {"index_add": "index_add_", "index_put": "_index_put_impl_"}  # in a backward pass
LIKE = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # of the argument, its shape alone
# Written, unread.
FILLED = set("copy_ fill_ zero_ exponential_ bernoulli_ normal_ uniform_ random_ _foreach_copy_ _foreach_zero_".split())
WRITTEN = {"flash_attn::_flash_attn_varlen_backward": {"dq", "dk", "dv"}}  # arguments written and unread
GATHERS = {"index_select", "embedding", "index", "gather"}  # of the source only the wanted rows are read
SCATTERS = {"index_copy_", "index_put_", "_index_put_impl_", "scatter_"}  # of the target only these rows are written
ADDED = {"index_add_", "scatter_add_"}  # and read
INDICES = ("index", "indices")


def as_on_gpu(operator: str, backward: bool) -> str:
    """The operator's name where tensors have values.

    Args:
        operator: its name, of aten.
        backward: whether it is part of a backward pass.
    """
    return IN_PLACE.get(operator, operator) if backward else operator


def kernels_of(operator: str, given: dict, result) -> int:
    """Kernels that it launches.

    Args:
        operator: its name, of aten.
        given: its arguments by their names.
        result: what it returns.
    """
    if operator in COPIES:
        target, source = (given["self"], given["src"]) if operator == "copy_" else (result, given["self"])
        return _copy(source, target)
    if operator in ON_A_COPY:
        return _copy(given["self"], result) + _scatter(given)
    if operator in ("index_put_", "_index_put_impl_"):
        return _scatter(given)
    if operator == "select_backward":  # zeros, and a copy into them
        return 1 + _copy(given["grad_output"], _zeros(given).select(given["dim"], given["index"]))
    if operator == "slice_backward":
        rows = slice(given["start"], given["end"], given["step"])
        part = _zeros(given).movedim(given["dim"], 0)[rows].movedim(0, given["dim"])
        return 1 + _copy(given["grad_output"], part)
    if operator == "constant_pad_nd":  # the constant, and a copy into it
        return 1 + _copy(given["self"], _unpadded(result, given["pad"]))
    if operator.startswith("_foreach_") or operator == "_fused_adamw_":
        return _of_lists(operator, given, result)
    if operator == "cat":
        tensors = given["tensors"]
        alike = len({tensor.dtype for tensor in tensors}) == 1
        return math.ceil(len(tensors) / CAT) if alike else len(tensors)
    if operator == "convolution":
        return 1 if given["bias"] is None else 2
    if operator == "convolution_backward":  # of its input, its weight and its bias
        return sum(given["output_mask"])
    if operator == "embedding_dense_backward":
        return 2 if given["indices"].numel() <= FEW_INDICES else 5
    if operator == "cumsum":
        return 2 if given["self"].dim() == 1 else 1
    if operator == "sort":  # the places' numbers, to every row of several, and the sort of not too many
        return 2 if given["self"].dim() == 1 else 3
    return KERNELS.get(operator, 1)


def _copy(source: Tensor, target: Tensor) -> int:
    """None where memory is copied as it lies, and between a host and a card, where the host casts."""
    if source.device != target.device:
        return 0
    return int(source.dtype != target.dtype or not _lie_alike(source, target))


def _lie_alike(source: Tensor, target: Tensor) -> bool:
    """Whether both have their elements in the same order, without gaps."""

    def steps(tensor: Tensor) -> list[tuple[int, int]]:
        return [(step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]

    if source.shape != target.shape or steps(source) != steps(target):
        return False
    expected = 1
    for step, size in sorted(steps(source)):
        if step != expected:
            return False
        expected *= size
    return True


def _scatter(given: dict) -> int:
    """Adding to rows by their indices sorts these first: two kernels, and a sum, of each tensor of indices, three more
    and the sort, of one kernel for some thousands."""
    indices = len(list(tensors_in(given.get("indices"))))
    return 3 * indices + 3 if given.get("accumulate") else 1


def _zeros(given: dict) -> Tensor:
    return given["grad_output"].new_empty(given["input_sizes"])


def _unpadded(padded: Tensor, pad: list[int]) -> Tensor:
    """The part of it that lies within the padding: (before, after) of the last dimension, then of the one before."""
    part = padded
    for place, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = padded.dim() - 1 - place
        first = max(before, 0)
        part = part.narrow(dim, first, part.shape[dim] - first - max(after, 0))
    return part


def _of_lists(operator: str, given: dict, result) -> int:
    """A kernel takes several tensors of all its lists, if they are alike; else each tensor has one of its own."""
    lists = [value for value in given.values() if isinstance(value, (list, tuple)) and len(list(tensors_in(value)))]
    if operator == "_fused_adamw_":
        return _multi_tensor(lists[0], MOST_TENSORS[ADAM_LISTS])
    if operator == "_foreach_norm":
        return _multi_tensor(lists[0], MOST_TENSORS[1]) + 1  # and the sum over blocks
    if not _fit_one_kernel(lists, casts=operator == "_foreach_copy_"):
        return len(lists[0])
    depth = len(lists) + (0 if operator.endswith("_") else 1)
    return _multi_tensor(lists[0], WITH_SCALARS if depth == 1 and "scalars" in given else MOST_TENSORS[depth])


def _fit_one_kernel(lists: list[list[Tensor]], casts: bool) -> bool:
    """Whether all have one dtype, and those that belong together lie alike."""
    dtypes = {tensor.dtype for tensors in lists for tensor in tensors}
    alike = (len({tensor.stride() for tensor in together}) == 1 for together in zip(*lists, strict=True))
    return (casts or len(dtypes) == 1) and all(alike)


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
    if operator in LIKE:
        return total(made)
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
