"""Another number of ranks: the optimiser's slices are cut anew, bit for bit, and training goes on as before."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albef_ds.training.checkpoint_files import read_tensors
from albef_ds.training.checkpoint_manifest import CheckpointError, read_manifest
from albef_ds.training.random_state import derive_random_state
from albef_ds.training.repartition import FlatLayout, cut_slice
from albef_ds.training.restore import MODEL_FILE, repartition, zero_file
from tests.ranks import run_ranks
from tests.training.checkpointed import MUON, run_part

STEPS = 7


# -- one vector --------------------------------------------------------------------------------------------------------


def slices(flat: torch.Tensor, layout: FlatLayout) -> list[torch.Tensor]:
    """As ZeRO cuts them, the padding left out at the end as DeepSpeed does where it saves masters."""
    return [flat[r * layout.slice_size : (r + 1) * layout.slice_size] for r in range(layout.world_size)]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    worlds=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    shuffled=st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_any_sizes_through_any_numbers_of_ranks_and_orders_come_back_bitwise(sizes, worlds, shuffled):
    shapes = {f"p{i}": (size,) for i, size in enumerate(sizes)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    layout = FlatLayout.of(shapes, worlds[0])
    parts = slices(torch.cat([values[name] for name in shapes]), layout)
    for world_size in worlds[1:]:
        order = list(shapes)
        shuffled.shuffle(order)
        new = FlatLayout.of({name: shapes[name] for name in order}, world_size)
        parts = [cut_slice(layout, new, rank, parts.__getitem__) for rank in range(world_size)]
        layout = new
        assert {part.numel() for part in parts} == {layout.slice_size}
    flat = torch.cat(parts)
    for name, start in layout.starts.items():
        assert torch.equal(flat[start : start + values[name].numel()], values[name]), name
    assert not flat[layout.total :].any()


def test_only_the_slices_that_are_needed_are_read():
    layout, asked = FlatLayout.of({"a": (16,)}, 4), set()
    cut_slice(layout, FlatLayout.of({"a": (16,)}, 8), 3, lambda r: asked.add(r) or torch.zeros(4))
    assert asked == {1}


def test_other_parameters_and_short_slices_are_refused():
    two, three = FlatLayout.of({"a": (3,), "b": (4,)}, 2), FlatLayout.of({"a": (3,), "b": (5,)}, 3)
    with pytest.raises(CheckpointError, match="of another size: b"):
        cut_slice(two, three, 0, lambda r: torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"rank 1's slice .* shape \(1,\)"):
        cut_slice(two, FlatLayout.of({"a": (3,), "b": (4,)}, 1), 0, lambda r: torch.zeros(4 if r == 0 else 1))


# -- real ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Seven steps on two ranks; and the same, of which steps 4 and 5 ran on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {"folder": folder, "undisturbed": run_ranks(2, run_part, str(folder), STEPS, (3,))}
    other = tmp_path_factory.mktemp("changed")
    shutil.copytree(folder / "step_00000003", other / "step_00000003")
    found["one rank"] = run_ranks(1, run_part, str(other), 5, (5,))
    found["two again"] = run_ranks(2, run_part, str(other), STEPS, ())
    return found


def mean_losses(ranks: list[dict]) -> dict[int, float]:
    return {step: sum(rank["losses"][step] for rank in ranks) / len(ranks) for step in ranks[0]["losses"]}


def test_two_ranks_then_one_then_two_train_as_two_do(runs):
    expected = mean_losses(runs["undisturbed"])
    assert runs["one rank"][0]["start"] == 3 and runs["two again"][0]["start"] == 5
    found = mean_losses(runs["one rank"]) | mean_losses(runs["two again"])
    assert sorted(found) == [4, 5, 6, 7]
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=2e-6), step
    for a, b in zip(runs["undisturbed"], runs["two again"], strict=True):
        assert a["final"].keys() == b["final"].keys()
        for name, value in a["final"].items():
            torch.testing.assert_close(b["final"][name], value, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_teacher_queues_and_everything_else_are_restored_bitwise_on_one_rank(runs):
    states = read_tensors(runs["folder"] / "step_00000003" / MODEL_FILE)["module"]
    restored = runs["one rank"][0]["restored"]
    assert {"teacher_due", "queue.image", "queue.pointer"} <= states.keys()
    assert any(name.startswith("teacher.") for name in states)
    for name, value in states.items():
        assert torch.equal(restored[name], value), name
    assert int(restored["queue.pointer"]) == 3 * 6


def test_the_optimiser_is_restored_bitwise_on_one_rank(runs):
    restored = runs["one rank"][0]["restored"]
    for rank, state in enumerate(zero_states(runs["folder"] / "step_00000003")):
        for group, master in enumerate(state["single_partition_of_fp32_groups"]):
            moments = state["base_optimizer_state"]["state"][group]
            start = rank * moments["exp_avg"].numel()
            assert master.numel() > 0
            for name, value in {"master": master, **moments}.items():
                kept = restored[f"{name} {group}"]
                kept = kept[start : start + master.numel()] if value.ndim else kept
                assert torch.equal(kept, value[: master.numel()] if value.ndim else value), (name, group, rank)
            assert float(moments["step"]) == 3


def test_random_numbers_start_anew_on_other_ranks_each_with_its_own_always_the_same(runs):
    first, second = (rank["random"] for rank in runs["two again"])
    assert not torch.equal(first, second) and not torch.equal(first, runs["undisturbed"][0]["random"])
    drawn = {}
    with torch.random.fork_rng():
        for where in ((3, 5, 2, 0), (3, 5, 2, 1), (3, 6, 2, 0), (3, 5, 1, 0), (4, 5, 2, 0), (3, 5, 2, 0)):
            derive_random_state(*where)
            numbers = (torch.rand(()).item(), random.random(), np.random.random())  # noqa: NPY002
            assert drawn.setdefault(where, numbers) == numbers
    assert len(set(drawn.values())) == len(drawn) == 5


def test_muon_s_momentum_goes_through_checkpoints_and_to_another_number_of_ranks(tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    undisturbed = run_ranks(2, run_part, str(whole), 4, (2,), 0.0, MUON)
    shutil.copytree(whole / "step_00000002", other / "step_00000002")
    resumed = run_ranks(2, run_part, str(other), 4, (), 0.0, MUON)
    alone = run_ranks(1, run_part, str(other), 4, (), 0.0, MUON)[0]
    for a, b in zip(undisturbed, resumed, strict=True):
        assert b["start"] == 2 and a["final"].keys() == b["final"].keys()
        for name, value in a["final"].items():
            assert torch.equal(b["final"][name], value), name
    [momentum] = [name for name in alone["restored"] if name.startswith("momentum ")]
    joined = torch.cat([rank["restored"][momentum] for rank in resumed])
    size = min(joined.numel(), alone["restored"][momentum].numel())  # the rest is padding
    assert torch.equal(alone["restored"][momentum][:size], joined[:size]) and joined.any()
    assert not joined[size:].any() and not alone["restored"][momentum][size:].any()
    expected = mean_losses(undisturbed)
    for step, loss in alone["losses"].items():
        # bf16 rounds an update by 1e-3 of itself, and otherwise where ranks stack other matrices together
        assert loss == pytest.approx(expected[step], rel=2e-4), step


# -- whole states, any number of ranks ---------------------------------------------------------------------------------


def zero_states(folder: Path) -> list[dict]:
    manifest = read_manifest(folder)
    files = [folder / zero_file(manifest, rank) for rank in range(manifest.world_size)]
    return [read_tensors(file)["optimizer_state_dict"] for file in files]


def test_four_ranks_then_three_then_one_then_two_keep_every_bit(runs):
    folder = runs["folder"] / "step_00000003"
    shapes = read_tensors(folder / MODEL_FILE)["param_shapes"]
    original = states = zero_states(folder)
    old = [FlatLayout.of(group, 2) for group in shapes]
    for world_size in (4, 3, 1, 2):
        new = [FlatLayout.of(group, world_size) for group in shapes]
        states = [repartition(old, new, rank, states.__getitem__) for rank in range(world_size)]
        old = new
        if world_size == 3:
            assert any(layout.padding(2) for layout in new), "no group is padded: choose other sizes"
    for before, after in zip(original, states, strict=True):
        assert after["group_paddings"] == before["group_paddings"]
        assert after["partition_count"] == before["partition_count"]
        for group, master in enumerate(before["single_partition_of_fp32_groups"]):
            assert torch.equal(after["single_partition_of_fp32_groups"][group][: master.numel()], master)
            for name, value in before["base_optimizer_state"]["state"][group].items():
                assert torch.equal(after["base_optimizer_state"]["state"][group][name], value), name


def test_parameters_padded_one_by_one_are_refused(runs):
    states = zero_states(runs["folder"] / "step_00000003")
    states[0]["param_alignment_paddings"] = [[0, 4], [0]]
    shapes = read_tensors(runs["folder"] / "step_00000003" / MODEL_FILE)["param_shapes"]
    old, new = ([FlatLayout.of(group, n) for group in shapes] for n in (2, 1))
    with pytest.raises(CheckpointError, match="parameter_alignment"):
        repartition(old, new, 0, states.__getitem__)
