"""The end of a process: no thread is left, of Gloo or the watchdog, that could abort it while Python ends."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.ranks import run_ranks
from tests.training_run import write_recipe

RANKS = 2


def gloo_threads() -> int:
    """PyTorch names the threads in which a Gloo group works."""
    names = []
    for file in Path("/proc/self/task").glob("*/comm"):
        try:
            names.append(file.read_text())
        except OSError:  # it ended meanwhile
            continue
    return sum("gloo" in name for name in names)


def ends(command: str, arguments: list[str]) -> tuple[int, int]:
    """(exit code, threads left) of albef_ds.train or albef_ds.evaluate."""
    from albef_ds import evaluate, train

    code = {"train": train, "evaluate": evaluate}[command].main(arguments)
    return code, gloo_threads()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Of five steps, with a checkpoint written in the background, and evaluation."""
    folder = tmp_path_factory.mktemp("leaving")
    test = {"test": str(folder / "data" / "test.json")}
    return write_recipe(folder, train={"max_steps": 5}, checkpoint={"every": 2}, data=test, evaluation={"k_test": 4})


def test_gloos_threads_are_seen():
    assert all(threads > 0 for threads in run_ranks(RANKS, threads_of_a_group))


def threads_of_a_group() -> int:
    import torch.distributed as dist

    from albef_ds.training.engine import init_distributed

    init_distributed()
    dist.barrier()
    return gloo_threads()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_and_evaluation_leave_none(recipe, optimizer):
    run = recipe.parent / optimizer
    settings = [str(recipe), f"optimizer.name={optimizer}", f"output_dir={run}"]
    assert run_ranks(RANKS, ends, "train", settings) == [(0, 0)] * RANKS
    weights = [str(recipe), str(run / "albef.pth")]
    assert run_ranks(RANKS, ends, "evaluate", weights) == [(0, 0)] * RANKS


def test_a_dry_run_leaves_none(recipe):
    assert run_ranks(RANKS, ends, "train", [str(recipe), "--dry-run"]) == [(0, 0)] * RANKS


def test_negatives_of_all_ranks_leave_none(recipe):
    arguments = [str(recipe), "--dry-run", "model.options.negatives=all"]
    assert run_ranks(RANKS, ends, "train", arguments) == [(0, 0)] * RANKS


def test_an_error_in_the_users_files_leaves_none(recipe, tmp_path):
    settings = yaml.safe_load(recipe.read_text())
    broken = tmp_path / "broken.json"
    broken.write_text('[{"image": 3}]')
    settings["data"]["train"] = [str(broken)]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert run_ranks(RANKS, ends, "train", [str(tmp_path / "recipe.yaml")]) == [(2, 0)] * RANKS


def leaves_while_writing(folder: str) -> int:
    """Leaves, as after an error, while a checkpoint is written; the checkpoints that are complete then."""
    from albef_ds.training import checkpoint_writer
    from albef_ds.training.engine import leave_distributed
    from tests.training.checkpointed import build, open_checkpoints

    engine = build()
    write, held = checkpoint_writer.write_tensors, threading.Event()
    checkpoint_writer.write_tensors = lambda *args: held.wait(60) and write(*args)
    checkpoints = open_checkpoints(Path(folder))
    checkpoints.save(engine, 1)
    threading.Timer(1.0, held.set).start()
    engine.destroy()
    leave_distributed(together=False)
    return len(list(Path(folder).glob("*/manifest.json")))


def test_a_checkpoint_that_is_being_written_is_finished_first(tmp_path):
    assert run_ranks(RANKS, leaves_while_writing, str(tmp_path / "checkpoints")) == [1] * RANKS


def leaves_while_the_watchdog_talks() -> list[str]:
    """The threads that are alive after a watchdog has left in the middle of its talk."""
    from albef_ds.training import watchdog
    from albef_ds.training.engine import init_distributed

    heard = watchdog._Rank.heard
    watchdog._Rank.heard = lambda self, said: (time.sleep(0.5), heard(self, said))
    init_distributed()
    with watchdog.Watchdog(dead_seconds=20, timeout_minutes=2):
        pass
    return [thread.name for thread in threading.enumerate() if "talk" in thread.name]


def test_the_watchdog_has_ended_its_talk():
    assert run_ranks(RANKS, leaves_while_the_watchdog_talks) == [[]] * RANKS
