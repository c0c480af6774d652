"""Muon: which parameters take it, what an update is, and that ranks that hold slices compute what one rank would."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.config import ConfigError, ModelConfig, OptimizerConfig
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.training.muon import Matrices, Muon, orthogonal
from albef_ds.training.optimizer import build_optimizer, muon_groups, parameter_groups
from albef_ds.training.repartition import FlatLayout
from tests.ranks import run_ranks
from tests.tiny import tiny_model

CONFIG = OptimizerConfig(name="muon", lr=1e-2, muon_lr_ratio=2.0, weight_decay=0.1)
SHAPES = {"a": (5, 7), "b": (1, 3), "c": (11, 4), "d": (5, 7), "e": (13, 13), "f": (2, 1)}


def test_only_matrices_of_blocks_take_it():
    config: ModelConfig = tiny_model()
    task = Pretraining(config)
    names = {id(p): name for name, p in task.named_parameters()}
    groups = muon_groups(task, CONFIG)
    [matrices] = [g for g in groups if g.get("muon")]
    found = {names[id(p)] for p in matrices["params"]}
    for name in (
        "visual_encoder.blocks.0.attn.qkv.weight",
        "text_encoder.bert.encoder.layer.0.attention.self.query.weight",
    ):
        assert f"model.{name}" in found
    for other in (
        "embeddings",
        "pos_embed",
        "patch_embed",
        "_proj.",
        "itm_head",
        "predictions",
        "bias",
        "norm",
        "temp",
    ):
        assert not any(other in name for name in found), other
    # Each trained parameter is in one group, with the decay that AdamW alone would give it.
    decay = {id(p): g["weight_decay"] for g in parameter_groups(task, CONFIG.weight_decay) for p in g["params"]}
    assert {id(p): g["weight_decay"] for g in groups for p in g["params"]} == decay
    assert sum(len(g["params"]) for g in groups) == len(decay)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_an_update_is_nearly_orthogonal_whatever_the_gradient_s_scale(rows, columns, scale, seed):
    matrix = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed))
    # Well conditioned: five iterations do not lift singular values a thousand times smaller than the largest.
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag_embed(s.clamp(min=0.2 * s.max().item())) @ v
    found = orthogonal(matrix * scale)
    assert found.shape == matrix.shape and found.dtype == matrix.dtype
    if scale * matrix.norm(dim=(1, 2)).max() > 1e-5:  # below, the guard against dividing by zero is felt
        unit = found / (0.2 * max(rows, columns) ** 0.5)
        singular = torch.linalg.svdvals(unit)
        # Jordan's coefficients lead into 0.68 to 1.14, bf16's rounding a little beyond: every case of this grid is
        # within 0.673 to 1.146. Values within [a, b] put the cosine to u v at 2 sqrt(ab) / (a + b) or above: 0.965.
        assert singular.min() > 0.65 and singular.max() < 1.17
        cosine = torch.nn.functional.cosine_similarity(unit.flatten(1), (u @ v).flatten(1))
        assert cosine.min() > 0.95
    assert found.isfinite().all()


def test_a_gradient_of_zeros_changes_nothing_but_the_decay():
    weight = torch.nn.Parameter(torch.randn(4, 6))
    before = weight.detach().clone()
    weight.grad = torch.zeros(4, 6)
    Muon([{"params": [weight], "muon": True, "lr_ratio": 2.0}], lr=0.1, weight_decay=0.5, fused=True).step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.2 * 0.5))


def test_an_update_has_the_size_of_adamw_s():
    weight = torch.nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 1e-4
    Muon([{"params": [weight], "muon": True, "lr_ratio": 1.0}], lr=1e-3, weight_decay=0.0, fused=True).step()
    rms = weight.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.2e-3, rel=0.2)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has its own since 2.9")
@pytest.mark.parametrize("shape", [(5, 7), (64, 16), (1, 3), (128, 128)])
def test_a_matrix_is_updated_as_by_pytorch_s_own(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs, before = torch.nn.Parameter(ours.detach().clone()), ours.detach().clone()
    muon = Muon([{"params": [ours], "muon": True, "lr_ratio": 2.0}], lr=5e-3, weight_decay=0.1, fused=True)
    # The settings are written out: its defaults may change.
    own = torch.optim.Muon(
        [theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        own.step()
    # bf16 products in another order: a hundredth of a step of 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=6e-4)
    assert (ours - before).abs().max() > 0.005


def test_the_rest_is_updated_as_by_adamw_alone():
    torch.manual_seed(0)
    ours, plain = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    plain.load_state_dict(ours.state_dict())
    matrix = torch.nn.Parameter(torch.randn(4, 4))
    muon = Muon(
        [{"params": list(ours.parameters())}, {"params": [matrix], "muon": True, "lr_ratio": 1.0}], lr=1e-2, fused=True
    )
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        x = torch.randn(2, 3)
        for layer, optimizer in ((ours, muon), (plain, adamw)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            matrix.grad = torch.randn(4, 4)
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_flat_parameter_that_is_no_slice_is_refused():
    weight = torch.nn.Parameter(torch.zeros(6))
    weight.grad = torch.ones(6)
    with pytest.raises(RuntimeError, match=r"shape \(6,\) is no matrix"):
        Muon([{"params": [weight], "muon": True, "lr_ratio": 1.0}], lr=0.1, fused=True).step()


def test_apex_beside_it_is_refused():
    with pytest.raises(ConfigError, match="optimizer.fused is apex, optimizer.name muon"):
        build_optimizer(torch.nn.Linear(2, 2), CONFIG, "apex")


# -- slices ------------------------------------------------------------------------------------------------------------


def weights_and_gradients() -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES.values()]
    return weights, [[torch.randn(w.shape, generator=generator) for w in weights] for _ in range(3)]


def step_slices() -> torch.Tensor:
    """Three steps on this rank's slice of all matrices; returns the slice."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = FlatLayout.of(SHAPES, world)

    def slice_of(tensors: list[torch.Tensor]) -> torch.Tensor:
        flat = torch.zeros(layout.slice_size * world)
        flat[: layout.total] = torch.cat([t.flatten() for t in tensors])
        return flat[rank * layout.slice_size : (rank + 1) * layout.slice_size].clone()

    weights, gradients = weights_and_gradients()
    flat = torch.nn.Parameter(slice_of(weights))
    muon = Muon([{"params": [flat], "muon": True, "lr_ratio": 3.0}], lr=1e-2, weight_decay=0.1, fused=True)
    muon.divide(flat, Matrices.of(SHAPES, rank, world))
    for step in gradients:
        flat.grad = slice_of(step)
        muon.step()
    return flat.detach()


def join_and_step_slices() -> torch.Tensor:
    from albef_ds.training.engine import init_distributed

    init_distributed()
    return step_slices()


@pytest.mark.parametrize("world", [2, 5])  # of five slices one matrix covers two bounds
def test_slices_of_ranks_are_updated_as_whole_matrices_are(world):
    weights, gradients = weights_and_gradients()
    whole = [torch.nn.Parameter(w.clone()) for w in weights]
    muon = Muon([{"params": whole, "muon": True, "lr_ratio": 3.0}], lr=1e-2, weight_decay=0.1, fused=True)
    for step in gradients:
        for weight, gradient in zip(whole, step, strict=True):
            weight.grad = gradient
        muon.step()
    expected = torch.cat([w.detach().flatten() for w in whole])
    found = torch.cat(run_ranks(world, join_and_step_slices))
    # Matrices may be stacked in other numbers, and bf16 products then round otherwise.
    torch.testing.assert_close(found[: expected.numel()], expected, rtol=0, atol=2e-3)
    assert not found[expected.numel() :].any()  # padding
    assert (expected - torch.cat([w.flatten() for w in weights])).abs().max() > 0.03
