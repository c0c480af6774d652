"""Recipes and overrides: every shipped recipe is valid, every slip is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from albef_ds.config import Config, ConfigError, load_config, plan_batches

RECIPES = sorted((Path(__file__).parent.parent / "albef_ds" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_headed_by_its_command_and_result(recipe):
    config = load_config(recipe)
    head = recipe.read_text().split("\ntask:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert any(command in head for command in ("deepspeed --num_gpus", "make demo", "albef_ds downstream"))
    assert "Expected" in head
    assert load_config(recipe.stem) == config
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_overrides_change_values_of_every_type():
    config = load_config(
        "demo", ["optimizer.lr=3e-4", "data.train=[a.json, b.json]", "data.test=null", "log.report=false"]
    )
    assert config.optimizer.lr == 3e-4
    assert config.data.train == ("a.json", "b.json")
    assert config.data.test is None and config.log.report is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ("train.lr=1", "unknown key 'train.lr'; did you mean 'optimizer.lr'"),
        ("modle.momentum=1", "unknown key 'modle'; did you mean 'model'"),
        ("model.momentum=2", "model.momentum: Input should be less than or equal to 1, got 2"),
        ("model.vision.heads=3", "vision.width 128 is not a multiple of vision.heads 3"),
        ("model.temperature=0.9", "temperature must lie between"),
        ("task=cooking", "task"),
        ("optimizer", "expected key.sub=value"),
        ("optimizer.lr.x=1", "'lr' is a value, not a section"),
        ("optimizer.lr=[", "override 'optimizer.lr=['"),
    ],
)
def test_slips_are_named(override, message):
    with pytest.raises(ConfigError) as error:
        load_config("demo", [override])
    assert message in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="no such file, nor one of .*demo.*; did you mean 'demo'"):
        load_config("demoo")
    for text, message in (
        ("a: [", "not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        ("!!python/object:os.x {}", "YAML"),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(path)


@given(world=st.integers(1, 16), micro=st.integers(1, 16), accumulation=st.integers(1, 16))
def test_the_batch_arithmetic_multiplies_out(world, micro, accumulation):
    batch = world * micro * accumulation
    overrides = [f"train.global_batch={batch}", f"train.micro_batch={micro}", "model.queue_size=4096"]
    plan = plan_batches(load_config("demo", overrides), world)
    assert (plan.micro_batch, plan.accumulation, plan.world_size) == (micro, accumulation, world)


def test_batches_that_do_not_divide_or_fit_are_named():
    def plan(world, **train):
        return plan_batches(load_config("demo", [f"train.{k}={v}" for k, v in train.items()]), world)

    with pytest.raises(ConfigError, match="global_batch 64 does not divide over 3 ranks"):
        plan(3)
    with pytest.raises(ConfigError, match="micro_batch 5 does not divide a rank's share of 32"):
        plan(2, micro_batch=5)
    with pytest.raises(ConfigError, match="global_batch 2048 is larger than model.queue_size 1024"):
        plan(2, global_batch=2048)
