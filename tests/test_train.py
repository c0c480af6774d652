"""The entry point with good and bad input, in real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.training_run import metrics, run_training, write_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A short run with evaluation and report, some of its images bad."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder)
    annotations = folder / "data" / "train.json"
    entries = json.loads(annotations.read_text())
    images = folder / "data"
    (images / entries[0]["image"]).unlink()
    (images / entries[1]["image"]).write_bytes((images / entries[1]["image"]).read_bytes()[:300])
    (images / entries[2]["image"]).write_text("<html>404 not found</html>")
    entries[3]["caption"] = ""
    entries[4]["caption"] = 7
    annotations.write_text(json.dumps(entries))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["test"] = str(folder / "data" / "test.json")
    recipe["log"]["report"] = recipe["log"]["keys"] = True
    recipe["evaluation"] = {"k_test": 4}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    codes, output = run_training([str(folder / "recipe.yaml")])
    assert codes == [0, 0], output
    return folder / "run", output


def test_a_run_leaves_what_it_promises(finished):
    run, output = finished
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "summary.json",
        "report.html",
        "albef.pth",
    ):
        assert (run / name).exists(), name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 13 and summary["samples_per_s"] > 0
    for ranking in ("itc", "itm"):
        assert 0 <= summary["retrieval"][ranking]["tr@1"] <= 100
    last = metrics(run)[13]
    expected = {"losses", "lr", "alpha", "temperature", "grad_norm", "samples_per_s", "data_wait", "mfu", "memory_gib"}
    assert expected | {"eta_s", "mi_bound"} <= last.keys()
    assert last["losses"].keys() == {"itc", "itm", "mlm", "total"}
    assert "report:" in output and "checkpoint:" in output


def test_bad_samples_are_replaced_counted_and_listed(finished):
    run, _ = finished
    entries = json.loads((run.parent / "data" / "train.json").read_text())
    rejected = {
        line["key"]: line["reason"] for line in map(json.loads, (run / "rejected.jsonl").read_text().splitlines())
    }
    for i in range(3):
        assert entries[i]["image"] in rejected
    assert sum("caption" in reason for reason in rejected.values()) == 2
    assert json.loads((run / "summary.json").read_text())["rejected"] == 5


def test_the_samples_of_every_step_are_written_on_request(finished):
    run, _ = finished
    lines = [[json.loads(x) for x in (run / f"keys_rank_0000{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    first_epoch = [key for rank in lines for line in rank if line["step"] <= 4 for key in line["keys"]]
    assert [line["step"] for line in lines[0]] == [step for step in range(1, 14) for _ in range(2)]
    assert len(first_epoch) == 96 and len(set(first_epoch)) >= 96 - 5  # a replacement may stand twice


def test_its_weights_evaluate_to_the_same_numbers_and_export(finished, tmp_path, capsys):
    from albef_ds.__main__ import main
    from albef_ds.model.weight_files import read_state_dict

    run, _ = finished
    assert main(["evaluate", str(run.parent / "recipe.yaml"), str(run / "albef.pth")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((run / "summary.json").read_text())["retrieval"]
    written = read_state_dict(run / "albef.pth")
    for name in ("out.pth", "out.safetensors"):
        assert main(["convert", str(run), str(tmp_path / name)]) == 0
        exported = read_state_dict(tmp_path / name)
        assert exported.keys() == written.keys()
        assert all(torch.equal(exported[k], v) for k, v in written.items())
    assert main(["convert", str(run), str(tmp_path / "bare.pth"), "--without-teacher"]) == 0
    assert not [k for k in read_state_dict(tmp_path / "bare.pth") if "_m." in k or "queue" in k]
    capsys.readouterr()
    assert main(["convert", str(tmp_path), str(tmp_path / "x.pth")]) == 2
    assert "neither a checkpoint nor a run" in capsys.readouterr().err


def test_a_finished_run_started_again_evaluates_and_keeps_its_numbers(finished):
    from albef_ds.demo import summary

    run, _ = finished
    before = json.loads((run / "summary.json").read_text())
    codes, output = run_training([str(run.parent / "recipe.yaml")])
    assert codes == [0, 0], output
    assert "after step 13" in output
    assert json.loads((run / "summary.json").read_text()) == before
    assert "13 steps" in summary(run, 1.0)


def test_dry_run_prints_batch_arithmetic_and_memory(tmp_path):
    recipe = str(write_recipe(tmp_path))
    codes, output = run_training([recipe, "--dry-run"])
    assert codes == [0, 0], output
    assert "24 samples a step = 6 a forward pass x 2 accumulated x 2 ranks" in output
    assert "GFLOP a sample" in output and "model state:" in output and "losses itc" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        (["trian.epochs=1"], "unknown key 'trian'; did you mean 'train'"),
        (["train.alpha=2"], "train.alpha: Input should be less than or equal to 1, got 2"),
        (["model.queue_size=20"], "train.global_batch 24 is larger than model.queue_size 20"),
        (["train.micro_batch=7"], "train.micro_batch 7 does not divide a rank's share of 24"),
        (["train.deepspeed=zero2_cpuu"], "did you mean 'zero2_cpu'"),
        (["data.train=[nowhere.json]"], "nowhere.json"),
        (["data.tokenizer=/nowhere/vocab.txt"], "/nowhere/vocab.txt"),
        (["model.weights=/nowhere/albef.pth"], "/nowhere/albef.pth: no such weights file"),
        (["model.vision.image_size=30"], "image_size 30 is not a multiple of patch_size 8"),
        (["schedule.warmup_steps=50"], "warmup_steps (50) must be below total_steps (13)"),
        (["--resume", "/nowhere/step_1"], "/nowhere/step_1: no complete checkpoint"),
        (["train.global_batch=48", "train.micro_batch=48", "data.train=[TINY]"], "48"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_gets_one_clear_message(tmp_path, arguments, message):
    recipe = str(write_recipe(tmp_path))
    tiny = tmp_path / "tiny.json"
    tiny.write_text(json.dumps([{"image": "a.jpg", "caption": "a"}]))
    arguments = [a.replace("TINY", str(tiny)) for a in arguments]
    codes, output = run_training([recipe, *arguments], ranks=1)
    assert codes == [2], output
    assert message in output
    assert "Traceback" not in output


def test_a_misspelt_key_in_the_deepspeed_json_is_named(tmp_path):
    recipe = str(write_recipe(tmp_path))
    json_file = tmp_path / "ds.json"
    json_file.write_text('{"zero_optimization": {"stage": 2}, "gradient_cliping": 1.0}')
    codes, output = run_training([recipe, "--deepspeed_config", str(json_file)], ranks=1)
    assert codes == [2] and "gradient_cliping" in output and "gradient_clipping" in output
