"""Which checkpoints stay: never fewer than the newest complete one."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from albef_ds.training.checkpoint_manifest import MANIFEST
from albef_ds.training.retention import (
    ASIDE,
    complete_folders,
    prune,
    set_aside,
    step_folder,
    step_folders,
    superfluous,
)


def make(folder: Path, *steps: int, complete: bool = True) -> None:
    for step in steps:
        target = folder / step_folder(step)
        target.mkdir(parents=True)
        (target / "a.pt").write_text("x")
        if complete:
            (target / MANIFEST).write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@given(steps=st.sets(st.integers(0, 500), min_size=1), keep=st.integers(1, 5), every=st.none() | st.integers(1, 60))
def test_the_newest_and_every_so_many_stay_and_nothing_else(steps, keep, every):
    gone = set(superfluous(steps, keep, every))
    stay = steps - gone
    assert gone <= steps and max(steps) in stay
    assert set(sorted(steps)[-keep:]) <= stay
    assert all(step % every == 0 for step in stay - set(sorted(steps)[-keep:])) if every else len(stay) <= keep
    assert not every or not any(step % every == 0 for step in gone)


def test_pruning_removes_the_superfluous_and_older_incomplete_ones_only(tmp_path):
    make(tmp_path, 10, 20, 30, 40, 50)
    make(tmp_path, 15, 60, complete=False)  # 60 is being written
    (tmp_path / "notes").mkdir()
    removed = prune(tmp_path, keep=2, keep_every=20, busy=[tmp_path / step_folder(30)])
    assert sorted(p.name for p in removed) == ["step_00000010", "step_00000015"]
    assert names(tmp_path) == ["notes"] + [step_folder(s) for s in (20, 30, 40, 50, 60)]
    assert [p.name for p in prune(tmp_path, keep=2, keep_every=20)] == [step_folder(30)]


def test_without_a_complete_one_nothing_is_removed(tmp_path):
    make(tmp_path, 1, 2, complete=False)
    assert prune(tmp_path, keep=1) == [] and len(names(tmp_path)) == 2


def test_checkpoints_are_sorted_by_number_and_links_are_left_alone(tmp_path):
    make(tmp_path, 99_999_999, 100_000_000, 5)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MANIFEST).write_text("{}")
    (tmp_path / "step_00000777").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "step_12").mkdir()
    assert [p.name for p in step_folders(tmp_path)] == ["step_100000000", "step_99999999", "step_00000005"]
    assert complete_folders(tmp_path) == step_folders(tmp_path)
    prune(tmp_path, keep=1)
    assert (tmp_path / "elsewhere" / MANIFEST).exists()
    assert step_folders(tmp_path / "nowhere") == []


def test_later_checkpoints_of_another_course_are_set_aside_not_lost(tmp_path):
    make(tmp_path, 10, 20, 30)
    set_aside(tmp_path, 20)
    assert names(tmp_path) == ["set_aside_step_00000020", "set_aside_step_00000030", "step_00000010"]
    make(tmp_path, 20)
    prune(tmp_path, keep=1)
    assert names(tmp_path) == ["set_aside_step_00000020", "set_aside_step_00000030", "step_00000020"]


def test_before_a_run_that_starts_over_saves_links_and_remains_are_set_aside(tmp_path):
    make(tmp_path, 3, 5, complete=False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MANIFEST).write_text("{}")
    (tmp_path / step_folder(4)).symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{ASIDE}{step_folder(4)}").symlink_to(tmp_path / "elsewhere")
    set_aside(tmp_path, 4)
    assert names(tmp_path) == ["elsewhere", *(f"{ASIDE}{step_folder(step)}" for step in (3, 4, 5))]
    assert (tmp_path / "elsewhere" / MANIFEST).exists()


def test_what_a_killed_run_left_of_its_first_is_removed(tmp_path):
    make(tmp_path, 3, complete=False)
    assert set_aside(tmp_path, 2) == [] and names(tmp_path) == []
