"""The host's share of a step, on the tiny model: what is put into the step is counted, and nothing else is."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import host, host_step, measure, other_checkout

TINY = ["--preset", "tiny", "--json"]
# One call, one operator, and some milliseconds in which nothing is called.
PLANTED = "batch = self.mix(batch); torch.empty(0); (lambda: None)(); sum(range(1_000_000))"


def measured(capsys, *arguments: str) -> dict:
    assert host.main([*TINY, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Another checkout of the same files."""
    for folder in ("albef_ds", "kernels"):
        shutil.copytree(measure.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def put_in(checkout: Path, old: str, new: str) -> None:
    file = checkout / "albef_ds/tasks/pretraining.py"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_another_checkout_differs_by_what_was_put_into_it(copy: Path, tmp_path: Path, capsys):
    put_in(copy, "batch = self.mix(batch)", PLANTED)
    found = measured(
        capsys, "--stages", "2", "--seconds", "0.2", "--against", str(copy), "--out", str(tmp_path / "made")
    )
    assert json.loads((tmp_path / "made/host.json").read_text()) == found
    other = found["against"]
    assert found["imported from"] == ["albef_ds", "kernels"]  # a committed result names no folder of a machine
    assert other["imported from"] == [str(copy / "albef_ds"), str(copy / "kernels")]
    assert other["more here"]["2"] == {
        "python calls": -1,
        "python calls in deepspeed": 0,
        "operators": -1,
        "operators without views": -1,
    }
    assert other["time here / there"]["2"]["forward"]["high"] < 0.95
    ours = found["stages"]["2"]
    assert ours["rounds"] >= 10 and ours["python calls"] == sum(ours["python calls by package"].values())
    assert ours["ms"].keys() == {*host_step.PHASES, "all"} and all(ms > 0 for ms in ours["ms"].values())


def test_a_checkout_that_does_not_fit_is_told_with_its_error(copy: Path, capsys):
    put_in(copy, "class Pretraining(Contrastive):", "class Other(Contrastive):")
    assert host.main([*TINY, "--stages", "2", "--counts", "--against", str(copy)]) == 2
    told = capsys.readouterr().err
    assert f"{copy}, stage 2: the step cannot be measured" in told and "cannot import name 'Pretraining'" in told


def test_a_process_that_ends_between_two_questions_is_told():
    args = host.arguments(["--preset", "tiny"])
    with pytest.raises(host.HostError, match="its process ended with -9"), host.Worker(measure.ROOT, 0, args) as worker:
        worker.process.kill()
        worker.process.wait()
        worker.ask("step")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as ended:
        host.main([*TINY, "--against", str(tmp_path)])
    assert ended.value.code == 2
    assert f"--against {tmp_path}: no checkout of this project" in capsys.readouterr().err


def test_what_the_checkout_lacks_is_not_taken_from_elsewhere(copy: Path):
    (copy / "albef_ds/build.py").unlink()
    finder = other_checkout.Finder(copy)
    assert finder.find_spec("json") is None
    assert finder.find_spec("albef_ds.kernels").origin == str(copy / "kernels/__init__.py")
    assert finder.find_spec("albef_ds.demo", [str(copy / "albef_ds")]).origin == str(copy / "albef_ds/demo.py")
    with pytest.raises(ModuleNotFoundError, match="has no module albef_ds.build"):
        finder.find_spec("albef_ds.build", [str(copy / "albef_ds")])
    with pytest.raises(RuntimeError, match="Python imported"):
        other_checkout.imported(copy)  # this process has the usual one


def test_calls_go_to_the_package_whose_file_it_is():
    def step():
        json.dumps([])
        (lambda: None)()

    found = host_step.python_calls(step, {json.__path__[0]: "json", __file__: "here"})
    assert found == {"json": 3, "here": 2, "other": 0}  # dumps, encode, iterencode; step and its own function


def test_views_are_counted_apart():
    x = torch.zeros(2, 3)
    assert host_step.operators(lambda: x.t() + 1) == {"operators": 2, "operators without views": 1}


def test_a_count_that_does_not_repeat_is_refused():
    numbers = iter(range(10))
    with pytest.raises(RuntimeError, match=r"differ in what they count: \{'calls': \(0, 1\)\}"):
        host_step.repeated(lambda: {"calls": next(numbers), "same": 1})
    assert gc.isenabled()
