"""The whole of it: on a sound recipe, on broken ones, on every recipe of the package and over two ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import yaml

from albef_ds.__main__ import main
from albef_ds.doctor import software
from albef_ds.doctor.finding import Finding, status
from tests.doctor.told import doctor, of, states
from tests.ranks import run_ranks
from tests.training_run import write_recipe


def test_what_is_not_ok_says_what_to_do_and_problems_alone_count():
    finding = Finding("warning", "cores", "2 for 8", "fewer workers")
    assert str(finding).splitlines()[1].strip() == "-> fewer workers" and "warning" in str(finding)
    assert "->" not in str(Finding("ok", "cores", "8 for 8"))
    assert status([finding, Finding("ok", "a", "b")]) == 0
    assert status([finding, Finding("problem", "a", "b", "c")]) == 1


def test_a_sound_recipe_has_no_problem(tmp_path):
    recipe = str(write_recipe(tmp_path))
    code, findings = doctor(recipe, "--gpus", "2")
    assert code == 0, [str(f) for f in findings if f.state == "problem"]
    assert "6 a forward pass x 2 accumulated x 2 ranks" in of(findings, "batches")[0].text
    assert "120 samples, 4 of 4" in of(findings, "data")[0].text
    assert of(findings, "disk") and of(findings, "memory") and of(findings, "tokenizer")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".doctor*"))  # it leaves nothing


def test_without_a_recipe_it_looks_at_the_machine(capsys):
    assert main(["doctor"]) in (0, 1)  # what this machine lacks is not known here
    told = capsys.readouterr().out
    for subject in ("python", "torch", "deepspeed", "compiler", "cores", "/dev/shm", "open files"):
        assert f" {subject} " in told, subject


def break_images(folder: Path, share: float) -> None:
    images = sorted((folder / "data" / "images").glob("*.jpg"))
    for image in images[: int(share * len(images))]:
        image.write_bytes(b"no image")


BROKEN = {
    "misspelt key": (["train.micro_batsh=4"], None, "recipe", "train.micro_batch"),
    "ranks": (["--gpus", "7"], None, "batches", "does not divide over 7 ranks"),
    "queue": (["model.queue_size=8"], None, "batches", "model.queue_size 8"),
    "deepspeed file": (["--deepspeed_config", "no.json"], None, "deepspeed file", "no.json"),
    "vocabulary": (["model.text.vocab_size=5"], None, "tokenizer", "smaller than the vocabulary"),
    "no vocabulary": (["data.tokenizer=nowhere/vocab.txt"], None, "tokenizer", "nowhere/vocab.txt"),
    "annotations": (["data.train=[nowhere.json]"], None, "data", "nowhere.json"),
    "shards": (["data.train=[]", "data.shards=[nowhere]"], None, "data", "nowhere"),
    "no data": (["data.train=[]"], None, "data", "are empty"),
    "images": ([], lambda folder: break_images(folder, 1.0), "data", "0 of 4"),
    "test": (["data.test=nowhere.json"], None, "data", "data.test: nowhere.json"),
    "weights": (["model.weights=nowhere.pth"], None, "weights", "nowhere.pth is not there"),
    "output": (["output_dir=/proc/run"], None, "disk", "cannot be written"),
    "batch": (["train.global_batch=240", "model.queue_size=300"], None, "data", "120 samples do not fill"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_a_problem_that_names_it(tmp_path, name):
    arguments, damage, subject, named = BROKEN[name]
    recipe = str(write_recipe(tmp_path))
    if damage:
        damage(tmp_path)
    code, findings = doctor(recipe, *arguments)
    problems = [f for f in of(findings, subject) if f.state == "problem"]
    assert code == 1 and any(named in f.text for f in problems), [str(f) for f in findings]
    assert all(f.advice for f in findings if f.state != "ok")


def test_some_broken_images_are_a_warning(tmp_path):
    recipe = str(write_recipe(tmp_path))
    break_images(tmp_path, 0.5)
    code, findings = doctor(recipe)
    assert code == 0 and "2 of 4" in of(findings, "data")[0].text and of(findings, "data")[0].state == "warning"


def test_numbers_of_ranks_that_would_do_are_named(tmp_path):
    _, findings = doctor(str(write_recipe(tmp_path)), "--gpus", "3")
    (batches,) = of(findings, "batches")
    assert batches.state == "problem"  # 8 samples a rank, not a multiple of 6
    assert batches.advice == "with these settings 1, 2, 4 ranks would do"


def test_every_recipe_of_the_package_can_be_examined():
    """Without its data: what is not there is a finding, never a traceback."""
    for file in sorted((Path(main.__code__.co_filename).parent / "configs").glob("*.yaml")):
        arguments = [file.stem, "data.tokenizer=nowhere/vocab.txt", "output_dir=."]
        code, findings = doctor(*arguments)
        assert code == 1 and of(findings, "recipe")[0].state == "ok", file.stem
        assert yaml.safe_load(file.read_text()).get("task", "pretraining") in of(findings, "recipe")[0].text


def doctor_on_a_rank(recipe: str) -> tuple[int, str]:
    os.environ["LOCAL_RANK"] = "0"  # each rank a host of its own
    if os.environ["RANK"] == "1":
        software.OLDEST_PYTHON = (99, 0)  # a host with a trouble of its own
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["doctor", recipe, "--json"])
    return code, out.getvalue()


def test_over_two_ranks_all_know_what_one_host_lacks_and_rank_0_tells(tmp_path):
    recipe = write_recipe(tmp_path)
    first, second = run_ranks(2, doctor_on_a_rank, str(recipe))
    assert first[0] == second[0] == 1 and "findings" not in second[1]
    findings = [Finding(**f) for f in json.loads(first[1].splitlines()[-1])["findings"]]
    own, other = of(findings, "python")
    assert own.state == "ok" and other.state == "problem" and other.text.startswith("on ")
    for subject in ("ranks", "network", "clocks", "output_dir"):
        assert states(of(findings, subject)) == ["ok"], subject
    assert of(findings, "batches")[0].text.endswith("x 2 ranks")
    assert not list(tmp_path.glob(".doctor*"))
