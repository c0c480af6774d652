"""Which attention backend is chosen, and what it is handed: without a GPU, by stand-ins with the kernels' own heads."""

from __future__ import annotations

import inspect
import logging
import sys
import types

import pytest
import torch

from albef_ds import optional
from albef_ds.model import attention as module
from albef_ds.model.attention import attention, resolve_backend, self_attention
from tests.model.packed_runs import by_hand, spans_of


@pytest.fixture
def gpu(monkeypatch):
    """A make-believe GPU with the packages named: enough to choose a backend, not to run one."""

    def pretend(*packages: str, capability=(8, 0)):
        resolve_backend.cache_clear()
        module._say_once.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(
            optional, "find", lambda name: optional.Presence(name in packages, None, "not installed (pip install it)")
        )
        flash = types.ModuleType("flash_attn")
        flash.flash_attn_varlen_func = None
        monkeypatch.setitem(sys.modules, "flash_attn", flash)

    yield pretend
    resolve_backend.cache_clear()


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "packages, capability, dtype, dropout, head_dim, chosen",
    [
        (("flash-attn", "varlen"), (8, 0), BF16, True, 64, "flash"),
        (("flash-attn", "varlen"), (8, 0), BF16, False, 12, "flash"),
        (("flash-attn", "varlen"), (8, 0), FP32, False, 64, "efficient"),
        (("flash-attn", "varlen"), (7, 5), BF16, False, 64, "efficient"),
        (("flash-attn", "varlen"), (9, 0), BF16, False, 264, "efficient"),
        (("varlen",), (9, 0), BF16, False, 64, "varlen"),
        (("varlen",), (9, 0), BF16, True, 64, "varlen"),
        ((), (9, 0), BF16, True, 64, "efficient"),
        (("varlen",), (9, 0), BF16, False, 12, "eager"),
        ((), (9, 0), BF16, False, 64, "efficient"),
        ((), (9, 0), torch.float64, False, 64, "eager"),
    ],
)
def test_on_a_gpu_the_first_that_can_is_taken(gpu, packages, capability, dtype, dropout, head_dim, chosen):
    gpu(*packages, capability=capability)
    assert resolve_backend("auto", "cuda", dtype, dropout, head_dim) == chosen


def test_the_choice_is_said_once_with_what_was_passed_over(gpu, caplog):
    gpu("varlen")
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for head_dim in (64, 64, 32):
            resolve_backend("auto", "cuda", BF16, False, head_dim)
    [line] = caplog.messages
    assert line.startswith("attention on cuda in bfloat16: varlen; flash is not available: not installed")


@pytest.mark.parametrize(
    "name, kind, why",
    [
        ("fast", ("cpu", FP32), "unknown backend 'fast'"),
        ("flash", ("cpu", BF16), "flash needs a CUDA device"),
        ("varlen", ("cpu", BF16), "varlen needs a CUDA device"),
        ("efficient", ("cpu", FP32), "efficient needs a CUDA device"),
        ("flash", ("cuda", FP32), "needs bf16 or fp16 arithmetic; here: cuda, float32"),
        ("flash", ("cuda", BF16), "flash is not available: not installed"),
        ("varlen", ("cuda", BF16, False, 20), "multiple of 8 numbers; here: .*heads of 20"),
        ("efficient", ("cuda", torch.float64), "needs fp32, bf16 or fp16"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_reason(gpu, name, kind, why):
    gpu("varlen")
    with pytest.raises(ValueError, match=f"model.attention: .*{why}"):
        resolve_backend(name, *kind)


def test_a_flash_attn_that_fails_to_import_is_passed_over(gpu, monkeypatch):
    gpu("flash-attn", "varlen")
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert resolve_backend("auto", "cuda", BF16) == "varlen"
    with pytest.raises(ValueError, match="flash cannot be imported"):
        resolve_backend("flash", "cuda", BF16)


def flash_attn_varlen_func(  # the head of flash-attn 2's function
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
):
    raise NotImplementedError


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    raise NotImplementedError


def bound_by_schema(operator, args, kwargs) -> dict:
    """The arguments of a call to one of torch's operators, by name."""
    given = dict(zip([a.name for a in operator._schema.arguments], args, strict=False)) | kwargs
    assert given.keys() <= {a.name for a in operator._schema.arguments}
    return given


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["flash", "varlen", "efficient"])
def test_packed_kernels_are_given_their_arguments_by_the_right_names(backend, causal, monkeypatch):
    """A stand-in with the kernel's own signature computes from the arguments as they arrive by name."""
    if backend == "flash":
        home, real = types.ModuleType("flash_attn"), flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", home)
    elif backend == "efficient":
        home, real = torch.ops.aten, torch.ops.aten._efficient_attention_forward.default
    else:
        home = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
        real = home.varlen_attn

    def arguments(args, kwargs) -> dict:
        if backend == "efficient":
            return bound_by_schema(real, args, kwargs)
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def stand_in(*args, **kwargs):
        given = arguments(args, kwargs)
        q, k, v = list(given.values())[:3]
        names = {name.replace("seqlens", "seq").replace("_seqlen", ""): value for name, value in given.items()}
        cu_q, cu_k, max_q, max_k = (names[name] for name in ("cu_seq_q", "cu_seq_k", "max_q", "max_k"))
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
        if backend == "efficient":
            assert given["bias"] is None and given["dropout_p"] == 0.0 and given["compute_log_sumexp"]
            down = {0: False, 1: True}[given["custom_mask_type"]]
            return by_hand(q[0], k[0], v[0], *lengths, down).to(q.dtype)[None], None, None, None, max_q, max_k
        assert backend == "varlen" or given["deterministic"] == torch.are_deterministic_algorithms_enabled()
        down = given["causal"] if backend == "flash" else {(-1, -1): False, (-1, 0): True}[given["window_size"]]
        return by_hand(q, k, v, *lengths, down).to(q.dtype)

    monkeypatch.setattr(
        home, "_efficient_attention_forward" if backend == "efficient" else real.__name__, stand_in, raising=False
    )
    monkeypatch.setattr(module, "resolve_backend", lambda name, *_: name)
    q_lengths, k_lengths = [3, 1, 7], [3, 1, 7] if causal else [2, 9, 4]
    q, k, v = (torch.randn(sum(n), 2, 8, requires_grad=True) for n in (q_lengths, k_lengths, k_lengths))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: causal)  # both ways, one with each
    out = attention(q, k, v, spans_of(q_lengths), spans_of(k_lengths), backend=backend, causal=causal)
    torch.testing.assert_close(out, by_hand(q, k, v, q_lengths, k_lengths, causal).float())


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_copy_of_flash_attn_is_given_dropout_by_its_operator(causal, monkeypatch):
    operator, seen = torch.ops.aten._flash_attention_forward.default, {}

    def stand_in(*args, **kwargs):
        seen.update(bound_by_schema(operator, args, kwargs))
        return (seen["query"] * 2,)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in)
    monkeypatch.setattr(module, "resolve_backend", lambda name, *_: name)
    q, spans = torch.randn(11, 2, 8), spans_of([3, 1, 7])
    assert torch.equal(attention(q, q, q, spans, spans, 0.25, "varlen", causal), q * 2)
    assert seen["dropout_p"] == 0.25 and seen["is_causal"] is causal and seen["return_debug_mask"] is False
    assert seen["cum_seq_q"] is seen["cum_seq_k"] is spans.cu_seqlens and seen["max_q"] == seen["max_k"] == 7


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_takes_a_packed_projection_as_it_is(deterministic, monkeypatch):
    def stand_in(*args, **kwargs):
        given = inspect.signature(flash_attn_varlen_qkvpacked_func).bind(*args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        assert given["dropout_p"] == 0.25 and given["deterministic"] is deterministic and not given["causal"]
        assert given["max_seqlen"] == 7 and given["cu_seqlens"].dtype == torch.int32
        lengths = given["cu_seqlens"].diff().tolist()
        return by_hand(*given["qkv"].unbind(1), lengths, lengths).float()

    home = types.ModuleType("flash_attn")
    home.flash_attn_varlen_qkvpacked_func = stand_in
    monkeypatch.setitem(sys.modules, "flash_attn", home)
    monkeypatch.setattr(module, "resolve_backend", lambda *_: "flash")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    qkv, spans = torch.randn(11, 3, 2, 8), spans_of([3, 1, 7])
    out = self_attention(qkv, spans, 0.25)
    torch.testing.assert_close(out, by_hand(*qkv.unbind(1), [3, 1, 7], [3, 1, 7]).float())
